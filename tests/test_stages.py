"""The stages from outside: processes started, files written, processes killed."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOY_VIDEO
from launch import Started, run, run_ranks
from safetensors.torch import load_file

from coldstart import order
from data import DIMENSIONS, DataError, follows_format, read_pairs
from model import DeScore
from support.run import read_tests
from support.settings import RunArgs

QUICK = [*TOY_VIDEO, "--lora-rank", 4, "--workers", 0, "--no-gradient-checkpointing"]


def coldstart(world_dir, out, *extra, launch=("coldstart.py",)):
    return run(*coldstart_command(world_dir, out, *extra, launch=launch))


def coldstart_command(world_dir, out, *extra, launch=("coldstart.py",)):
    return [*launch, "--backbone", "toy/backbone", "--train", world_dir / "train_cots.jsonl", "--out", out,
            "--epochs", 1, "--batch-size", 6, "--max-tokens", 1000, "--lr", 1e-3, "--max-new-tokens", 150,
            *QUICK, *extra]


def rl(world_dir, model, out, *extra, launch=("rl.py",)):
    return run(*launch, "--model", model, "--train", world_dir / "train.jsonl", "--out", out, "--batch-size",
               4, "--think-tokens", 1700, "--group-size", 4, "--lr", 1e-3, "--max-new-tokens", 150, *QUICK,
               *extra)  # a pair's thoughts at a time


def torchrun(script, processes):
    return ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, script)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


RECITED = (ROOT / "tests/recited.py",)  # rl.py, on any number of processes with the same rollouts
STAGE2 = ("--steps", 2, "--updates", 2, "--length-low", 60, "--length-high", 120)


@pytest.fixture(scope="module")
def stage1(world_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "coldstart"
    coldstart(world_dir, out, "--test", world_dir / "test_id.jsonl", "--eval-every", 1)
    return out


@pytest.fixture(scope="module")
def stage2(world_dir, stage1, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "rl"
    rl(world_dir, stage1, out, *STAGE2, "--test", world_dir / "test_id.jsonl", launch=RECITED)
    return out


def test_stage_1_logs_evaluates_and_saves(stage1):
    records = metrics(stage1)
    assert [record["step"] for record in records] == [0, 1, 1, 2, 2]  # before, step, during, step, after
    for record in records[1::2]:
        assert {"loss", "accuracy", "margin", "grad_norm", "lr", "seconds"} <= set(record)
        assert 0 < record["loss"] < 10 and 0 <= record["accuracy"] <= 1
    for record in records[0::2]:
        assert {"test_id/accuracy", "test_id/accuracy_no_cot", "test_id/quality",
                "test_id/format_rate"} <= set(record)
    model = DeScore.load(stage1)
    assert model.info["stage"] == "coldstart" and model.info["score_std"] > 0


def test_stage_2_logs_every_part_of_its_loss(stage2):
    steps = [record for record in metrics(stage2) if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2]
    for record in steps:
        assert {"reward", "reward_format", "reward_quality", "reward_length", "advantage_spread", "no_signal",
                "clip_fraction", "kl", "entropy", "cot_tokens", "truncated", "bt_loss",
                "grad_norm"} <= set(record)
        weights = {"format": 0.1, "quality": 0.7, "length": 0.2}
        assert abs(record["reward"] - sum(w * record[f"reward_{name}"] for name, w in weights.items())) < 1e-9
        assert record["kl"] >= 0 and 0 <= record["no_signal"] <= 1 and record["entropy"] > 0
    assert steps[-1]["kl"] > 0  # the policy has moved


def test_stage_2_may_train_the_mergers(world_dir, stage1, tmp_path):
    rl(world_dir, stage1, tmp_path, "--steps", 1, "--updates", 2, "--train-merger", "true", "--batch-size", 2,
       "--group-size", 2, "--max-new-tokens", 30)
    before, after = (DeScore.load(run).qwen.model.visual.state_dict() for run in (stage1, tmp_path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "merger" in name}
    # Nothing was evaluated: what stage 1 measured is not the scale of these scores.
    assert "score_std" in DeScore.load(stage1).info and "score_std" not in DeScore.load(tmp_path).info


def test_a_model_of_stage_2_is_still_an_adapter_on_the_backbone(stage2):
    config = json.loads((stage2 / "model/descore.json").read_text())
    assert (stage2 / "model" / config["backbone"]).resolve() == ROOT / "toy/backbone"
    names = load_file(stage2 / "model/adapter_model.safetensors")
    assert names and not any("reference" in name for name in names)
    assert DeScore.load(stage2).info["stage"] == "rl"


def parameters(out):
    return load_file(out / "model/adapter_model.safetensors") | load_file(out / "model/descore.safetensors")


def assert_same_training(one, two):
    """Two runs agree to rounding. Adam divides by the root of the second moment, which amplifies the rounding
    of gradients near zero and hides a wrong scale, so weights are compared over whole tensors, and gradient
    norms as well."""
    for name, value in parameters(one).items():
        other = parameters(two)[name]
        assert (value - other).norm() <= 5e-3 * value.norm(), name
    for key, tolerance in (("loss", 5e-5), ("grad_norm", 1e-3)):
        figures = [[record[key] for record in metrics(out) if key in record] for out in (one, two)]
        assert figures[0] == pytest.approx(figures[1], rel=tolerance, abs=tolerance), key


@pytest.mark.slow
def test_two_processes_train_stage_1_like_one(world_dir, stage1, tmp_path):
    coldstart(world_dir, tmp_path, launch=torchrun("coldstart.py", 2))
    assert_same_training(stage1, tmp_path)


@pytest.mark.slow
def test_two_processes_train_stage_2_like_one(world_dir, stage1, stage2, tmp_path):
    rl(world_dir, stage1, tmp_path, *STAGE2, launch=torchrun(*RECITED, 2))
    assert_same_training(stage2, tmp_path)


def test_infer_prints_the_cot_the_sub_scores_and_the_score(world_dir, stage2):
    pair = read_pairs(world_dir / "test_id.jsonl")[0]
    command = ["infer.py", pair.video_a, pair.prompt, "--model", stage2, "--max-new-tokens", 160]
    text = run(*command).stdout
    assert "<think>" in text and "\nscore " in text and "\ndynamics " in text
    found = json.loads(run(*command, "--json").stdout)
    assert found["cot"].strip() in text and f"{found['score']:+.4f}" in text
    assert found["sub_scores"].keys() == {"subject", "dynamics", "camera", "environment", "style"}
    assert not found["truncated"] and isinstance(found["standardised"], float)


def test_a_truncated_cot_is_scored_and_marked(world_dir, stage2):
    pair = read_pairs(world_dir / "test_id.jsonl")[0]
    command = ["infer.py", pair.video_a, pair.prompt, "--model", stage2, "--max-new-tokens", 7]
    found = json.loads(run(*command, "--json").stdout)
    assert found["truncated"] and found["sub_scores"] is None and isinstance(found["score"], float)
    assert "token limit" in run(*command).stdout


def test_infer_ranks_and_evaluates(world_dir, stage2, tmp_path):
    pair = read_pairs(world_dir / "test_id.jsonl")[0]
    found = json.loads(run("infer.py", pair.video_a, pair.video_b, pair.prompt, "--model", stage2,
                           "--max-new-tokens", 160, "--json").stdout)
    assert {record["video"] for record in found} == {pair.video_a, pair.video_b}
    assert found[0]["score"] >= found[1]["score"]
    figures = json.loads(run("infer.py", "--pairs", world_dir / "test_id.jsonl", "--model", stage2, "--out",
                             tmp_path / "deep/p.jsonl", "--max-new-tokens", 160, "--json").stdout)
    first, *judged = [json.loads(line) for line in (tmp_path / "deep/p.jsonl").read_text().splitlines()]
    assert len(first["made_by"]["weights"]) == 64 and len(judged) == 8
    scores = {record["video"]: record["score"] for record in judged}
    pairs = [pair for pair in read_pairs(world_dir / "test_id.jsonl") if pair.human]
    right = [(scores[pair.video_a] > scores[pair.video_b]) == (pair.human > 0) for pair in pairs]
    assert figures["accuracy"] == sum(right) / len(right)
    assert figures["format_rate"] == sum(follows_format(record["cot"]) for record in judged) / len(judged)


def test_test_sets_go_by_the_names_of_their_files(world_dir):
    paths = [str(world_dir / "test_id.jsonl"), str(world_dir / "test_ood.jsonl")]
    tests = read_tests(RunArgs(test=paths), DIMENSIONS)
    assert {name: len(pairs) for name, pairs in tests.items()} == {"test_id": 4, "test_ood": 4}
    with pytest.raises(DataError, match="the same name"):
        read_tests(RunArgs(test=paths[:1] * 2), DIMENSIONS)


@pytest.mark.parametrize(("command", "message"), [
    (["infer.py", "a.mp4", "a cat", "--model", "toy/backbone"], "toy/backbone: has no trained [Reward]"),
    (["infer.py", "a.mp4", "a cat", "--model", "toy"], "toy: neither descore.json"),
    (["coldstart.py", "--backbone", "toy/backbone", "--train", "missing.jsonl"],
     "missing.jsonl: no such file"),
    (["rl.py", "--model", "toy/backbone", "--train", "requirements.txt"],
     "requirements.txt, row 1: not JSON"),
])
def test_errors_are_one_clear_line(command, message, tmp_path):
    if command[0] in ("coldstart.py", "rl.py"):
        command = [*command, "--out", tmp_path]
    done = run(*command, check=False)
    assert done.returncode == 1 and f"error: {message}" in done.stderr and "Traceback" not in done.stderr


def test_stage_1_needs_cots_and_stage_2_reference_scores(world_dir, tmp_path):
    bare = [json.loads(line) for line in (world_dir / "train.jsonl").read_text().splitlines()]
    for pair in bare:
        pair |= {key: str(world_dir / pair[key]) for key in ("video_a", "video_b")}
        del pair["scores_b"]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in bare))
    for script, message in (("coldstart.py", "has no CoTs"), ("rl.py", "has no reference sub-scores")):
        done = run(script, "--backbone", "toy/backbone", "--train", tmp_path / "bare.jsonl", "--out",
                   tmp_path / "out", check=False)
        assert done.returncode == 1 and message in done.stderr


def absolute(world_dir, name):
    """The pairs of a file, such that it can be written anywhere."""
    pairs = [json.loads(line) for line in (world_dir / name).read_text().splitlines()]
    return [pair | {key: str(world_dir / pair[key]) for key in ("video_a", "video_b")} for pair in pairs]


def write(path, pairs):
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.mark.slow
def test_a_run_killed_at_its_last_evaluation_has_its_model(world_dir, stage1, tmp_path):
    """And goes on, though the test set has moved, one of its videos is broken, and its log is shorter."""
    out, test = tmp_path / "run", ("--test", world_dir / "test_id.jsonl")
    shutil.copytree(stage1, out)
    shutil.rmtree(out / "model")
    (out / "model.replaced").mkdir()  # an older one, whose place was not taken
    process = Started(*coldstart_command(world_dir, out, *test, "--eval-every", 1))
    while not (out / "model/descore.json").is_file() and process.running():
        time.sleep(0.002)
    process.kill()
    assert process.wait().returncode == -9
    model = DeScore.load(out)
    assert model.info["stage"] == "coldstart" and "score_std" not in model.info
    one, two = parameters(stage1), parameters(out)
    assert all(torch.equal(one[name], two[name]) for name in one)

    pairs = absolute(world_dir, "test_id.jsonl")
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 100)
    pairs[0]["video_b"] = str(tmp_path / "broken.mp4")
    log = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").write_bytes(log[: log.rindex(b'"step": 2') + 20])
    moved = ("--test", write(tmp_path / "moved.jsonl", pairs))
    done = coldstart(world_dir, out, *moved, "--eval-temperature", 0.5, "--eval-before", "false",
                     "--think-tokens", 900, "--max-new-tokens", 140)
    assert "metrics.jsonl: some of its last lines are lost" in done.stderr
    records = metrics(out)
    assert [record["step"] for record in records] == [0, 1, 1, 2] and "moved/quality" in records[-1]
    assert DeScore.load(out).info["score_std"] == records[-1]["moved/score_std"]


LORA, SHARDED = ("--lora-rank", 4), ("--lora-rank", 0, "--shard", "full")


@pytest.mark.parametrize(("stage", "extra"), [
    ("coldstart", LORA), *[pytest.param("rl", each, marks=pytest.mark.slow) for each in (LORA, SHARDED)]])
def test_a_step_in_which_nothing_can_be_read_moves_nothing(stage, extra, world_dir, tmp_path):
    """With two ranks, of which one has no pair at all."""
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 100)
    pairs = absolute(world_dir, "train_cots.jsonl")[:2]
    pairs[order(2, 1, 0)[1]]["video_a"] = str(tmp_path / "broken.mp4")  # of the second step
    steps = {"coldstart": ["--epochs", 1], "rl": ["--steps", 2, "--updates", 1, "--group-size", 2]}
    out, train = tmp_path / "out", write(tmp_path / "pairs.jsonl", pairs)
    run_ranks(2, f"{stage}.py", "--model", "toy/backbone", "--out", out, "--train", train, "--lr", 1e-3,
              "--batch-size", 1, "--max-new-tokens", 20, "--max-skipped", 1, "--save-every", 1, *TOY_VIDEO,
              "--workers", 0, *steps[stage], *extra)
    first, second = [record for record in metrics(out) if "grad_norm" in record]
    assert first["grad_norm"] > 0 and first["loss"] is not None
    assert second["grad_norm"] == 0 and second["loss"] is None and second["left_out"] == 0
    sums = [(out / f"checkpoints/step-{step}/SHA256SUMS").read_text().splitlines() for step in (1, 2)]
    assert sums[0][:-1] == sums[1][:-1]  # weights and moments, bit for bit; the last is state.json


@pytest.fixture
def one_broken(world_dir, tmp_path):
    """The training pairs, one of them with a video that is none."""
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 100)
    lines = []
    for i, line in enumerate((world_dir / "train_cots.jsonl").read_text().splitlines()):
        pair = json.loads(line) | {"preference": "A"}
        pair |= {key: str(world_dir / pair[key]) for key in ("video_a", "video_b")}
        lines.append(json.dumps(pair | ({"video_b": "broken.mp4"} if i == 5 else {})) + "\n")
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    return tmp_path / "pairs.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["coldstart.py", "rl.py"])
def test_a_broken_clip_drops_its_pair_up_to_a_limit(script, one_broken, tmp_path):
    command = [script, "--backbone", "toy/backbone", "--train", one_broken, "--out", tmp_path / "out",
               "--batch-size", 6, "--max-tokens", 1500, "--max-new-tokens", 8, *QUICK]
    stage2 = ["--steps", 2, "--updates", 1, "--group-size", 2]
    command += ["--epochs", 2] if script == "coldstart.py" else stage2
    stopped = run(*command, check=False)
    assert stopped.returncode == 1 and "1 of 12 pairs have videos that cannot be read" in stopped.stderr
    assert "broken.mp4: not a video" in stopped.stderr and "Traceback" not in stopped.stderr
    run(*command, "--max-skipped", 0.1)
    (record,) = map(json.loads, (tmp_path / "out/skipped.jsonl").read_text().splitlines())
    assert any(video.endswith("broken.mp4") for video in record["videos"])
    assert (tmp_path / "out/model/descore.json").is_file()


@pytest.mark.slow
def test_evaluation_is_resumed_reported_and_the_same(world_dir, stage2, tmp_path):
    command = ["infer.py", "--pairs", world_dir / "test_id.jsonl", "--model", stage2, "--out",
               tmp_path / "p.jsonl", "--max-new-tokens", 160, "--max-tokens", 600, "--json"]
    whole = json.loads(run(*command).stdout)
    lines = (tmp_path / "p.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 8
    (tmp_path / "p.jsonl").write_text("".join(lines[:4]) + lines[4][:20])  # killed amid the fourth
    again = run(*command)
    assert "going on after 3 of 8 videos" in again.stderr
    assert json.loads(again.stdout) == whole and (tmp_path / "p.jsonl").read_text() == "".join(lines)
    assert whole["pairs"] == 4 and set(whole["intervals"]) == {"accuracy", "accuracy_ties", "accuracy_no_cot",
                                                               "accuracy_ties_no_cot"}
    for name, (low, high) in whole["intervals"].items():
        assert 0 <= low <= whole[name] <= high <= 1
    assert sum(row["pairs"] for row in whole["generators"].values()) == 4
    other = run(*command[:2], world_dir / "test_ood.jsonl", *command[3:], check=False)
    assert other.returncode == 1 and "holds judgements of other videos" in other.stderr


def test_scoring_without_a_cot_and_with_several(world_dir, stage2):
    pair = read_pairs(world_dir / "test_id.jsonl")[0]
    command = ["infer.py", pair.video_a, pair.prompt, "--model", stage2, "--max-new-tokens", 160, "--json"]
    off = json.loads(run(*command, "--cot", "off").stdout)
    assert off["cot"] is None and isinstance(off["score"], float)
    several = json.loads(run(*command, "--samples", 4).stdout)
    assert several["score_std"] > 0
    text = run(*command[:-1], "--samples", 4).stdout
    assert f"{several['score']:+.4f} ± {several['score_std']:.4f}" in text


def test_an_instruction_of_ones_own(world_dir, stage2, tmp_path):
    pair = read_pairs(world_dir / "test_id.jsonl")[0]
    command = ["infer.py", pair.video_a, pair.prompt, "--model", stage2, "--max-new-tokens", 5, "--json"]
    (tmp_path / "mine.txt").write_text("Watch <video>. It should show: <prompt>")
    mine = json.loads(run(*command, "--instruction", tmp_path / "mine.txt").stdout)
    assert mine["score"] != json.loads(run(*command).stdout)["score"]
    (tmp_path / "mine.txt").write_text("Watch it.")
    bad = run(*command, "--instruction", tmp_path / "mine.txt", check=False)
    assert bad.returncode == 1 and "must hold <video> exactly once" in bad.stderr


@pytest.mark.slow
def test_a_stage_trains_in_our_layout_whatever_the_models_own(world_dir, tmp_path):
    figures = []
    for layout in ("ours", "release"):
        start = tmp_path / layout
        shutil.copytree(ROOT / "toy/backbone", start)
        info = json.loads((start / "descore.json").read_text())
        (start / "descore.json").write_text(json.dumps(info | {"scoring_layout": layout}))
        run("coldstart.py", "--model", start, "--train", world_dir / "train_cots.jsonl", "--epochs", 1,
            "--out", tmp_path / f"out-{layout}", "--batch-size", 12, "--mask-p", 0, *TOY_VIDEO,
            "--workers", 0)
        lines = (tmp_path / f"out-{layout}/metrics.jsonl").read_text().splitlines()
        figures.append(next(record for record in map(json.loads, lines) if "loss" in record))
        saved = json.loads((tmp_path / f"out-{layout}/model/descore.json").read_text())
        assert saved.get("scoring_layout", "ours") == "ours"
    assert figures[0]["loss"] == figures[1]["loss"] and figures[0]["grad_norm"] == figures[1]["grad_norm"]


def test_a_last_test_set_of_which_nothing_can_be_read_does_not_end_a_run_in_vain(world_dir, tmp_path):
    pair = json.loads((world_dir / "test_id.jsonl").read_text().splitlines()[0])
    for side in ("video_a", "video_b"):
        pair[side] = str(tmp_path / f"{side}.mp4")
        Path(pair[side]).write_bytes(b"not a video" * 100)
    (tmp_path / "broken.jsonl").write_text(json.dumps(pair) + "\n")
    run("coldstart.py", "--model", ROOT / "toy/backbone", "--train", world_dir / "train_cots.jsonl",
        "--epochs", 1, "--out", tmp_path / "out", "--batch-size", 12, *QUICK, "--eval-before", "false",
        "--max-new-tokens", 5, "--test", world_dir / "test_id.jsonl", tmp_path / "broken.jsonl")
    info = json.loads((tmp_path / "out/model/descore.json").read_text())
    figures = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1])
    assert info["score_mean"] == figures["test_id/score_mean"] and figures["broken/unreadable"] == 1
    assert info["score_quantiles"][0] <= info["score_mean"] <= info["score_quantiles"][-1]
