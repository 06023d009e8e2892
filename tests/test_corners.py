"""Corners that decide numbers: odd frames, long videos, gradients that are none, the steps at which a run is
evaluated, and what it takes up again after a kill."""

import json
import math
import shutil
import signal

import numpy as np
import pytest
import torch
import world
from conftest import ROOT, TOY_VIDEO
from launch import run
from plain import TOKENS, figures
from safetensors.torch import load_file

from coldstart import order
from data import DataError, VideoSettings, read_pairs, read_video, smart_nframes, smart_resize
from infer import by_key, judge
from model import DeScore
from support.ranks import ALONE
from support.run import Run
from support.settings import RunArgs

# ------------------------------------------------------------------------------------------------------------
# Frames and pixels, as qwen-vl-utils has them


@pytest.mark.parametrize(("total", "fps", "asked", "expected"), [
    (48, 24, {}, 4),  # two seconds
    (48, 24, {"min_frames": 5}, 6), (48, 24, {"min_frames": 7}, 8), (48, 24, {"min_frames": 6}, 6),
    (5, 24, {"min_frames": 7}, 4),  # no more than there are
    (240, 24, {"min_frames": 7}, 20),  # more than the least
    (240, 24, {"max_frames": 7}, 6), (240, 24, {"max_frames": 8}, 8), (240, 24, {"max_frames": 19}, 18),
    (240, 24, {"max_frames": 21}, 20), (240, 24, {"min_frames": 5, "max_frames": 5}, 4),
    (240, 24, {"fps": 1.1}, 10), (240, 24, {"fps": 1.25}, 12),  # 11 and 12.5
    (9600, 24, {}, 768), (9600, 24, {"max_frames": 2000}, 800), (2001, 2, {"max_frames": 3000}, 2000)])
def test_frames_are_even_in_number_and_within_bounds(total, fps, asked, expected):
    assert smart_nframes(total, fps, VideoSettings(**asked)) == expected


@pytest.mark.parametrize(("size", "frames", "asked", "expected"), [
    # Of 128,000 · 0.9 tokens of 32² pixels two frames get 2/300: 786,432 pixels, the most that one ever gets.
    # √(1080 · 1920 / 786,432) = 1.624, 1080 / 1.624 = 665 and 1920 / 1.624 = 1182, down to 32s.
    ((1080, 1920), 300, {}, (640, 1152)), ((1080, 1920), 8, {}, (640, 1152)),
    ((480, 720), 300, {}, (480, 704)),  # as it is, but for the 32s
    ((480, 720), 300, {"max_pixels": 448 * 448}, (352, 544)),  # by 1.312
    # 2/400: 589,824 pixels, 1080 / 1.875 = 576.
    ((1080, 1920), 400, {}, (576, 1024)),
    # 2/768: 307,200 pixels, by 2.598 and by 1.061.
    ((1080, 1920), 768, {}, (384, 736)), ((480, 720), 768, {}, (448, 672)),
    ((480, 720), 768, {"max_pixels": 448 * 448}, (352, 544)),
    # 2/2,000 would be 117,965. A frame keeps its least, 131,072, and 5 % more: 137,625, by 3.882 and 1.585.
    ((1080, 1920), 2000, {}, (256, 480)), ((480, 720), 2000, {}, (288, 448)),
    ((480, 720), 2000, {"min_pixels": 4096}, (256, 416)),  # by 1.712
    # Too small: √(131,072 / 64²) = 5.66, up to 32s.
    ((64, 64), 2000, {}, (384, 384)), ((64, 64), 2000, {"min_pixels": 4096}, (64, 64))])
def test_the_frames_of_a_long_video_share_its_pixels(size, frames, asked, expected):
    assert smart_resize(*size, frames, VideoSettings(**asked)) == expected


@pytest.mark.parametrize(("asked", "frames", "side"), [
    ({}, 10, 128),  # 81,920 / 10 · 2 = 128²
    ({"min_frames": 11}, 12, 96), ({"max_frames": 7}, 6, 160), ({"max_pixels": 10_000}, 10, 96)])
def test_a_video_is_read_so(asked, frames, side, tmp_path):
    """Five seconds of 40 frames, which are as many shades of grey."""
    shades = [np.full((256, 256, 3), 6 * shade, np.uint8) for shade in range(40)]
    world.write_video(tmp_path / "v.mp4", np.stack(shades), fps=8)
    settings = VideoSettings(**{"min_pixels": 1024, "total_pixels": 5 * 128 * 128} | asked)
    found, seconds = read_video(tmp_path / "v.mp4", settings)
    assert found.shape == (frames, 3, side, side)
    shown = [round(39 * place / (frames - 1)) for place in range(frames)]
    assert seconds == pytest.approx([shade / 8 for shade in shown])
    assert np.allclose(found.float().mean((1, 2, 3)), [6 * shade for shade in shown], atol=3)


# ------------------------------------------------------------------------------------------------------------
# Gradients that are not finite


@pytest.mark.parametrize(("norms", "ends"), [
    ([math.nan] * 4, False), ([math.nan] * 5, True), ([math.inf, math.nan] * 2 + [-math.inf], True),
    ([math.nan] * 4 + [1.0] + [math.nan] * 4, False), ([math.inf] * 4 + [0.0] + [math.inf] * 4, False),
    ([math.nan] * 4 + [1.0] + [math.nan] * 5, True), ([math.nan, 1.0] * 9, False)])
def test_five_updates_in_a_row_without_a_finite_gradient_end_a_run(norms, ends, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *handler: None)
    going = Run(RunArgs(out=str(tmp_path), train="x"), "rl", ALONE)
    for norm in norms[:-1]:
        going.check_gradient(norm)
    if ends:
        with pytest.raises(DataError, match="the gradients of 5 updates in a row were not finite"):
            going.check_gradient(norms[-1])
    else:
        going.check_gradient(norms[-1])


# ------------------------------------------------------------------------------------------------------------
# Whole runs: evaluated every two steps, killed at an evaluation of which the last checkpoint knows nothing

SEED, TEMPERATURE, FEW = 3, 3.0, 8
NO_FIRST = ["--eval-before", "false"]
STEPS = {"coldstart": [2, 4, 6], "rl": [0, 2, 3]}  # that are evaluated; rl before the first too
STEPS["recited"] = STEPS["rl"]
SAVED = {"coldstart": 2, "rl": 1, "recited": 1}
DIED = {"coldstart": 4, "rl": 2, "recited": 2}
RECITED = pytest.param("recited", marks=pytest.mark.slow)
# Dies before it writes a second line of a step to held_out.jsonl.
DIES = """
import os, pathlib, runpy, signal, sys

_, held_out, step, *sys.argv = sys.argv


def watch(event, arguments):
    if event == "open" and str(arguments[0]) == held_out and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        if os.path.exists(held_out) and f'"step": {step},' in pathlib.Path(held_out).read_text():
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(watch)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def files(world_dir, tmp_path_factory):
    """Twelve pairs to train on: one video is missing, and one of step 2 and one of step 4 are broken. And two
    test sets, of which the first has videos that stand twice."""
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for name in ("train_cots", "test_id", "test_ood"):
        found[name] = []
        for pair in lines_of(world_dir / f"{name}.jsonl"):
            for side in "ab":
                pair[f"video_{side}"] = str(world_dir / pair[f"video_{side}"])
            found[name].append(pair)
    train = found["train_cots"]
    for pair in train:
        pair["preference"] = pair["preference"].replace("tie", "A")
    places = order(11, 1, SEED)  # two a step, three in rl
    for place in (places[2], places[4]):
        train[place]["video_b"] = str(folder / f"broken-{place}.mp4")
        (folder / f"broken-{place}.mp4").write_bytes(b"not a video" * 100)
    train.insert(0, train[5] | {"video_a": str(folder / "missing.mp4")})
    del train[12:]
    first = found["test_id"][:3]
    first.append(first[0] | {"video_b": first[0]["video_a"], "scores_b": first[0]["scores_a"],
                             "video_a": first[0]["video_b"], "scores_a": first[0]["scores_b"]})
    tests = {"first": first, "second": found["test_ood"][:2]}
    write(folder / "train.jsonl", train)
    for name, pairs in tests.items():
        write(folder / f"{name}.jsonl", pairs)
    return folder, tests


def command(stage, folder, out, *extra):
    """A short run of a stage. "recited" is rl of which all that is sampled recites whole CoTs (plain.py)."""
    common = ["--model", ROOT / "toy/backbone", "--train", folder / "train.jsonl", "--out", out, "--test",
              folder / "first.jsonl", folder / "second.jsonl", "--eval-every", 2,
              "--seed", SEED, "--eval-temperature", TEMPERATURE, "--keep-rollouts", 99, "--lora-rank", 4,
              "--save-every", SAVED[stage], "--lr", 1e-3, "--max-skipped", 0.3, "--workers", 0, *TOY_VIDEO,
              "--no-gradient-checkpointing"]
    if stage == "coldstart":
        return [ROOT / "coldstart.py", *common, "--epochs", 1, "--batch-size", 2, "--max-new-tokens", FEW,
                *NO_FIRST, *extra]
    tokens = TOKENS if stage == "recited" else FEW
    script = [ROOT / "tests/plain.py", "rl"] if stage == "recited" else [ROOT / "rl.py"]
    return [*script, *common, "--steps", 3, "--batch-size", 3, "--group-size", 2, "--updates", 1,
            "--max-new-tokens", tokens, *extra]


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """Each stage's run, never disturbed, with what it printed."""
    found = {}

    def get(stage):
        if stage not in found:
            out = tmp_path_factory.mktemp(stage) / "run"
            found[stage] = out, run(*command(stage, files[0], out)).stdout
        return found[stage]

    return get


@pytest.mark.parametrize("stage", ["coldstart", pytest.param("rl", marks=pytest.mark.slow), RECITED])
def test_each_evaluation_is_of_its_step_and_the_last_gives_the_scale(stage, files, whole):
    out, printed = whole(stage)
    records = [record for record in lines_of(out / "metrics.jsonl") if "first/accuracy" in record]
    kept = lines_of(out / "held_out.jsonl")
    assert [record["step"] for record in records] == STEPS[stage]
    assert len(kept) == len(STEPS[stage]) * (6 + 4)
    for record in records:
        wanted = {"step": record["step"]}
        for name, pairs in files[1].items():
            some = [one for one in kept if one["step"] == record["step"] and one["test"] == name]
            of_set = figures(pairs, some)
            del of_set["pairs"], of_set["generators"]
            assert len(of_set) == 10  # four accuracies and that of reading, and five of the CoTs and scores
            wanted |= {f"{name}/{figure}": value for figure, value in of_set.items()}
            for one in some:
                of_pair = [pair for pair in pairs if pair["prompt"] == one["prompt"]]
                side = "a" if of_pair[0]["video_a"] == one["video"] else "b"
                assert one["reference"] == of_pair[0][f"scores_{side}"]
        assert record == pytest.approx(wanted)
    assert len({record["second/score_mean"] for record in records}) == len(records)
    assert records[-1]["first/score_std"] != records[-1]["second/score_std"]
    last = records[-1]
    del last["step"]
    assert json.loads(printed[printed.rindex("\n{"): printed.rindex("}") + 1]) == last
    info = json.loads((out / "model/descore.json").read_text())
    assert [info["score_mean"], info["score_std"]] == [last["second/score_mean"], last["second/score_std"]]
    scores = sorted(one["score"] for one in kept[-4:])
    for percent, found in enumerate(info["score_quantiles"]):
        below, part = divmod(percent * (len(scores) - 1), 100)
        above = min(below + 1, len(scores) - 1)
        assert found == pytest.approx(scores[below] + (scores[above] - scores[below]) * part / 100, abs=6e-5)


def test_an_evaluation_thinks_at_its_temperature_with_the_draws_of_every_other(files, whole):
    out, _ = whole("coldstart")
    kept = by_key(record for record in lines_of(out / "held_out.jsonl")
                  if (record["step"], record["test"]) == (6, "first"))
    pairs = read_pairs(files[0] / "first.jsonl")
    keys = list(dict.fromkeys(key for pair in pairs for key in pair.videos()))
    model = DeScore.load(out)
    again = {}
    for temperature, seed in ((TEMPERATURE, 0), (1.0, 0), (TEMPERATURE, SEED)):
        judged = judge(model, keys, max_new_tokens=FEW, temperature=temperature, seed=seed)
        again[temperature, seed] = {key: record["cot"] for key, record in by_key(judged).items()}
    cots = {key: record["cot"] for key, record in kept.items()}
    assert cots == again.pop((TEMPERATURE, 0))
    assert all(cots != others for others in again.values())


@pytest.mark.parametrize("stage", ["coldstart", pytest.param("rl", marks=pytest.mark.slow), RECITED])
def test_what_a_run_has_logged_beyond_its_checkpoint_is_done_again(stage, files, whole, tmp_path):
    folder, (out, _) = files[0], whole(stage)
    (tmp_path / "dies.py").write_text(DIES)
    killed, words = tmp_path / "killed", command(stage, folder, tmp_path / "killed")
    dead = run(tmp_path / "dies.py", killed / "held_out.jsonl", DIED[stage], *words, check=False)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert [path.name for path in (killed / "checkpoints").iterdir()] == [f"step-{SAVED[stage]}"]
    assert [record["step"] for record in lines_of(killed / "held_out.jsonl")].count(DIED[stage]) == 1
    for name in ("metrics", "rollouts")[: 1 if stage == "coldstart" else 2]:
        assert lines_of(killed / f"{name}.jsonl")[-1]["step"] == DIED[stage]
    skipped = lines_of(out / "skipped.jsonl")
    assert lines_of(killed / "skipped.jsonl") == skipped and len(skipped) == 3
    if stage == "coldstart":
        # Two of the three were skipped before the checkpoint, and count.
        shutil.copytree(killed, tmp_path / "copy")
        done = run(*command(stage, folder, tmp_path / "copy", "--max-skipped", 0.2), check=False)
        assert done.returncode == 1 and "3 of 12 pairs have videos that cannot be read" in done.stderr
        assert lines_of(tmp_path / "copy/skipped.jsonl") == skipped
    assert f"going on after step {SAVED[stage]}" in run(*words).stdout
    for name in ("rollouts", "held_out", "skipped"):
        assert (killed / f"{name}.jsonl").read_bytes() == (out / f"{name}.jsonl").read_bytes(), name
    logs = []
    for path in (killed, out):
        logs.append(lines_of(path / "metrics.jsonl"))
        for record in logs[-1]:
            for name in [name for name in record if name.startswith("seconds")]:
                del record[name]
    assert logs[0] == logs[1]
    assert (killed / "model/descore.json").read_text().replace(str(killed), str(out)) == (
        out / "model/descore.json").read_text()
    for path in (out / "model").glob("*.safetensors"):
        weights = load_file(killed / "model" / path.name)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(path).items())


def test_stage_2_counts_updates_and_not_steps(files, tmp_path):
    """A rate that blows the weights up with the first update: the next five, in steps 1 to 3, have no finite
    gradient."""
    done = run(*command("rl", files[0], tmp_path / "run", "--lr", 1e18, "--updates", 2, *NO_FIRST,
                        "--eval-every", 0, "--batch-size", 2, "--max-new-tokens", 3), check=False)
    assert done.returncode == 1 and "gradients of 5 updates in a row were not finite" in done.stderr
    assert [record["left_out"] for record in lines_of(tmp_path / "run/metrics.jsonl")] == [0.5, 1.0]
