"""A run goes on with what it began with, an adapter with its backbone, a judgement with its video."""

import hashlib
import json
import os
import shutil
import subprocess
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import demo
import prepare
import pytest
import torch
from conftest import ROOT, TOY_VIDEO
from launch import run, run_ranks
from safetensors.torch import load_file, save_file
from test_runs import Threads

import infer
from data import DataError, read_pairs
from model import DeScore
from support import digests, tables
from support.files import default_model, digest
from support.ranks import ALONE
from support.run import Run
from support.settings import RunArgs, parse_args
from tools import annotate as annotating
from tools import journal as journals
from tools.journal import Journal, fingerprint

QUICK = [*TOY_VIDEO, "--workers", 0, "--max-new-tokens", 8, "--lora-rank", 2, "--no-gradient-checkpointing"]
BACKBONE = ROOT / "toy/backbone"


def load(source):
    return DeScore.load(source, device="cpu")


def nudge(folder):
    """Let the weights of a backbone be others of the same shapes."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = max(weights)
    weights[name] = weights[name] + 0.01
    save_file(weights, path, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------------------
# Runs


def turn(path):
    """Turn the label of the first pair."""
    first, *rest = path.read_text().splitlines(keepends=True)
    pair = json.loads(first)
    pair["preference"] = {"A": "B", "B": "A"}[pair["preference"]]
    path.write_text(json.dumps(pair) + "\n" + "".join(rest))


def halve(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]))


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def ours(world_dir, tmp_path_factory):
    """A copy of the project with a backbone, pairs and a reward of its own, and finished runs of both stages
    in it."""
    root = tmp_path_factory.mktemp("project")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, root)
    for folder in ("support", "tools"):
        shutil.copytree(ROOT / folder, root / folder)
    shutil.copytree(BACKBONE, root / "backbone")
    pairs = []
    for line in (world_dir / "train_cots.jsonl").read_text().splitlines():
        pair = json.loads(line)
        pair |= {key: str(world_dir / pair[key]) for key in ("video_a", "video_b")}
        pairs += [pair] * (pair["preference"] != "tie")
    (root / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs[:4]))
    # What it imports is among the run's code, but for files that decide nothing (`ONLY_WRITE`).
    reward = "import tools.trackers\n\ndef longer(text, n_tokens, gold):\n    return float(n_tokens)\n"
    (root / "mine.py").write_text(reward)
    (root / "own.py").write_text("def think(model, *args):\n    return model.think(*args)\n")
    (root / "ask.txt").write_text("<video><prompt>\nThink, then judge.")
    for stage in ("coldstart", "rl"):
        run(*command(stage), root=root)
    return root


def command(stage, *more):
    common = ["--train", "train.jsonl", "--batch-size", 2, *QUICK, *more]
    if stage == "coldstart":
        return ["coldstart.py", "--model", "backbone", "--epochs", 1, "--head-lr", 0, "--lr", 1e-3,
                "--instruction", "ask.txt", "--save-every", 1, *common]
    return ["rl.py", "--steps", 1, "--updates", 1, "--group-size", 2, "--reward", "mine.py:longer=0.1",
            "--rollouts", "own.py:think", *common]


PAIRS = "the training pairs (train.jsonl)"
# What is changed under its name: by which stage, where, how, and what is said.
CHANGES = {
    "labels": ("coldstart", "train.jsonl", turn, f"{PAIRS} have changed since step 2"),
    "half the pairs": ("coldstart", "train.jsonl", halve, f"{PAIRS} have changed since step 2"),
    "bt_loss": ("coldstart", "coldstart.py", lambda path: edit(path, "-F.logsigmoid(r_w - r_l) * weight",
                                                               "(1 - r_w + r_l).relu() * weight"),
                "coldstart.py has changed since step 2"),
    "backbone": ("coldstart", "backbone/model.safetensors", lambda path: nudge(path.parent),
                 "the model it began from (backbone) has changed since step 2"),
    "instruction": ("coldstart", "ask.txt", lambda path: edit(path, "Think", "Guess"),
                    "the instruction has changed since step 2"),
    "reward": ("rl", "mine.py", lambda path: edit(path, "float(n_tokens)", "-float(n_tokens)"),
               "the reward file mine.py has changed since step 1"),
    "rollouts": ("rl", "own.py", lambda path: edit(path, "*args)\n", "*args)  # a remark\n"),
                 "the rollouts file own.py has changed since step 1"),
    "stage 1": ("rl", "runs/coldstart/model/descore.json",
                lambda path: edit(path, '"subject": 2', '"subject": 3'),
                "the model it began from (runs/coldstart) has changed since step 1"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_does_not_go_on_with_something_else(what, ours):
    stage, name, change, message = CHANGES[what]
    before = (ours / name).read_bytes()
    change(ours / name)
    done = run(*command(stage), check=False, root=ours)
    (ours / name).write_bytes(before)
    assert done.returncode == 1 and "going on" not in done.stdout, done.stdout + done.stderr
    said = f"error: runs/{stage}: {message}. --resume insist goes on all the same, --resume false starts anew"
    assert said in done.stderr.splitlines()


def test_what_is_insisted_on_is_said_and_only_what_decides_is_compared(ours):
    (ours / "notes.json").write_text('{"resume": "insist"}')
    kept = {}
    for name, old, new in (("rl.py", "return -terms.sum() / count", "return -terms.sum() / count * 2"),
                           ("tools/trackers.py", "class ", "# a remark\nclass ")):
        kept[name] = (ours / name).read_text()
        (ours / name).write_text(kept[name].replace(old, new, 1))
        assert (ours / name).read_text() != kept[name]
    done = run(*command("rl", "--preset", "notes.json"), root=ours)
    for name, text in kept.items():
        (ours / name).write_text(text)
    assert "warning: runs/rl: rl.py has changed since step 1\n" in done.stderr
    assert "going on after step 1" in done.stdout and "runs/rl: done" in done.stdout


def test_a_run_keeps_digests_of_the_code_that_it_has_imported(ours):
    for stage in ("coldstart", "rl"):
        path = max((ours / f"runs/{stage}/checkpoints").glob("step-*/state.json"))
        found = json.loads(path.read_text())["digests"]
        code = {name: sha256 for name, sha256 in found.items() if name.endswith(".py") and " " not in name}
        assert {f"{stage}.py", "coldstart.py", "model.py", "data.py", "support/run.py"} <= set(code)
        assert not digests.ONLY_WRITE & set(code) and ("rl.py" in code) == (stage == "rl")
        for name, sha256 in code.items():
            assert hashlib.sha256((ours / name).read_bytes()).hexdigest() == sha256
    assert all((ROOT / name).is_file() for name in digests.ONLY_WRITE)


@pytest.fixture
def resumed(tmp_path):
    """Takes up a state.json with such digests; what a run has now is the digest 1 of `a` and 2 of `b`."""
    def check(before, resume="true"):
        going = object.__new__(Run)
        going.out, going.ranks, going.args = tmp_path, ALONE, Namespace(resume=resume)
        going.digests = {"a": "1", "b": "2"}
        going.check_digests({"step": 3} | before)

    return check


def test_a_difference_stops_but_a_checkpoint_that_knows_nothing_only_warns(resumed, tmp_path, capsys):
    resumed({"digests": {"a": "1", "b": "2"}})
    resumed({"digests": {"a": "1", "no longer imported": "3"}})
    assert capsys.readouterr().err == ""
    message = f"{tmp_path}: a has changed, b has changed since step 3"
    with pytest.raises(DataError, match=f"{message}. --resume insist goes on"):
        resumed({"digests": {"a": "2", "b": "1"}})
    resumed({"digests": {"a": "2", "b": "1"}}, "insist")
    assert capsys.readouterr().err == f"warning: {message}\n"
    resumed({})
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {tmp_path}: the checkpoint of step 3 does not say")
    assert said.count("\n") == 1


def test_the_first_rank_alone_calculates_and_all_learn_of_it_or_fail():
    lists, barrier, asked = [[], []], threading.Barrier(2), []

    def work(rank, fails):
        asked.append(rank)
        if fails:
            raise OSError("gone")
        return {"a": "1"}

    def rank(number, fails):
        try:
            return Threads(number, lists, barrier).ask_first(partial(work, number, fails))
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(rank, (0, 1), (False, False))) == [{"a": "1"}] * 2
        assert list(pool.map(rank, (0, 1), (True, True))) == ["gone"] * 2
    assert asked == [0, 0]


@pytest.mark.slow
def test_a_difference_stops_every_rank(world_dir, tmp_path):
    shutil.copy(world_dir / "train_cots.jsonl", world_dir / "other.jsonl")
    arguments = ["coldstart.py", "--model", BACKBONE, "--train", world_dir / "other.jsonl", "--epochs", 1,
                 "--batch-size", 4, "--out", tmp_path, *QUICK]
    run_ranks(2, *arguments)
    halve(world_dir / "other.jsonl")
    for done in run_ranks(2, *arguments, check=False):
        assert done.returncode == 1 and "other.jsonl) have changed since step" in done.stderr


@pytest.mark.parametrize(("flags", "preset", "found"), [
    ([], {}, "true"), (["--resume", "false"], {}, "false"), ([], {"resume": False}, "false"),
    ([], {"resume": True}, "true"), (["--resume", "insist"], {"resume": False}, "insist")])
def test_resume_is_true_false_or_insist(flags, preset, found, tmp_path, monkeypatch):
    (tmp_path / "preset.json").write_text(json.dumps(preset))
    preset = ["--preset", str(tmp_path / "preset.json")]
    monkeypatch.setattr("sys.argv", ["x", *preset, "--train", "x", "--model", "x", *flags])
    assert parse_args(RunArgs, "coldstart").resume == found


def test_a_rate_of_0_for_query_and_head_is_none(ours):
    one, two = (load_file(ours / f"runs/coldstart/checkpoints/step-{step}/rank-0.safetensors")
                for step in (1, 2))
    same = {name for name, weight in one.items() if torch.equal(weight, two[name])}
    assert {name for name in same if name.startswith("weight/")} == {"weight/query", "weight/head.weight"}


def test_device_0_is_a_device():
    if torch.cuda.is_available():
        assert DeScore.load(BACKBONE, device=0).device == torch.device("cuda", 0)
    else:
        with pytest.raises(DataError, match="0: no such device"):
            DeScore.load(BACKBONE, device=0)


# ------------------------------------------------------------------------------------------------------------
# Adapters


@pytest.fixture
def adapted(tmp_path):
    """A backbone, and an adapter on it."""
    shutil.copytree(BACKBONE, tmp_path / "backbone")
    model = load(tmp_path / "backbone")
    model.set_trainable(2)
    model.save(tmp_path / "adapter")
    return tmp_path / "backbone", tmp_path / "adapter"


def test_an_adapter_is_loaded_on_its_own_backbone_alone(adapted, capsys):
    backbone, adapter = adapted
    info = json.loads((adapter / "descore.json").read_text())
    named = {name: hashlib.sha256((backbone / name).read_bytes()).hexdigest()
             for name in ("config.json", "model.safetensors")}
    assert info["backbone_sha256"] == hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
    (backbone / "generation_config.json").unlink()
    (backbone / "README.md").write_text("beside")
    for options in ({}, {"dtype": torch.bfloat16}, {"quant": "4bit"}):
        again = DeScore.load(adapter, device="cpu", **options)
        again.save(adapter.parent / "again")
        assert json.loads((adapter.parent / "again/descore.json").read_text())["backbone_sha256"] == info[
            "backbone_sha256"]
    for name, change in (("model.safetensors", lambda: nudge(backbone)),
                         ("config.json", lambda: edit(backbone / "config.json", '"rms_norm_eps": 1e-06',
                                                      '"rms_norm_eps": 1e-05'))):
        before = (backbone / name).read_bytes()
        change()
        message = rf"{adapter}: its adapter was trained on another backbone \(\.\./backbone\) than {backbone}"
        with pytest.raises(DataError, match=message):
            load(adapter)
        (backbone / name).write_bytes(before)
    assert capsys.readouterr().err == ""
    del info["backbone_sha256"]
    (adapter / "descore.json").write_text(json.dumps(info))
    load(adapter)
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {adapter}: does not say what its backbone was like")
    assert str(backbone) in said and said.count("\n") == 1


def test_an_adapter_keeps_its_backbone_from_stage_to_stage(ours):
    found = {json.loads((ours / f"runs/{stage}/model/descore.json").read_text())["backbone_sha256"]
             for stage in ("coldstart", "rl")}
    assert found == {digests.of_backbone(ours / "backbone")}


def test_weights_in_several_files_are_all_in_the_fingerprint(adapted):
    backbone, _ = adapted
    model = load(backbone)
    (backbone / "model.safetensors").unlink()
    model.qwen.save_pretrained(backbone, max_shard_size="2MB")
    shards = sorted(backbone.glob("model-*.safetensors"))
    found = {digests.of_backbone(backbone)}
    for path in shards:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        found.add(digests.of_backbone(backbone))
        path.write_bytes(content)
    assert len(found) == 1 + len(shards) > 2


def test_a_large_file_is_read_once(tmp_path, monkeypatch):
    path, read = tmp_path / "weights", []
    path.write_bytes(b"one")
    monkeypatch.setattr(digests, "REMEMBERED_FROM", 1)
    monkeypatch.setattr(digests, "digest", lambda path: read.append(path) or digest(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(digests.remembered, [path] * 8)) == {hashlib.sha256(b"one").hexdigest()}
    before = len(read)
    assert digests.remembered(path) == digest(path) and len(read) == before
    (entry,) = (tmp_path / "cache/descore").iterdir()
    def replace():  # by another of the same size and time, as a layer of a container image may be
        time_ns = path.stat().st_mtime_ns
        path.write_bytes(b"six")
        os.utime(path, ns=(time_ns, time_ns))

    for change in (lambda: path.write_bytes(b"two"), replace, lambda: os.utime(path, (1, 1)),
                   lambda: path.write_bytes(b"four"), lambda: entry.write_text("{"),
                   lambda: entry.write_text("[]"), entry.unlink):
        change()
        before = len(read)
        assert digests.remembered(path) == digest(path) and len(read) == before + 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # a file: nothing can be kept there
    assert digests.remembered(path) == digest(path) and len(read) == before + 2
    assert [path.name for path in (tmp_path / "cache/descore").iterdir()] == [entry.name]


# ------------------------------------------------------------------------------------------------------------
# Judgements


MADE = {"seed": 0, "cot": None}


@pytest.fixture
def clips(tmp_path):
    """Two files that pass for videos, and their keys."""
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_text(name)
    return [(str(tmp_path / name), "p") for name in ("a.mp4", "b.mp4")]


def judge_both(path, clips):
    journal = Journal(path, MADE, clips)
    for video, prompt in clips:
        if (video, prompt) not in journal.records:
            journal.add({"video": video, "prompt": prompt, "cot": Path(video).read_text()})
    journal.lock.close()
    return {Path(video).name: record["cot"] for (video, _), record in journal.records.items()}


def test_a_record_says_what_its_file_was_and_nobody_sees_it(clips, tmp_path):
    judge_both(tmp_path / "j", clips)
    for line in (tmp_path / "j").read_text().splitlines()[1:]:
        record = json.loads(line)
        path = Path(record["video"])
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        assert record["files"] == [{"size": 5, "mtime_ns": path.stat().st_mtime_ns, "sha256": sha256}]
    records = Journal(tmp_path / "j", MADE, clips).records.values()
    assert [set(record) for record in records] == [{"video", "prompt", "cot"}] * 2


def test_a_clip_that_was_replaced_is_judged_anew_and_another_is_not(clips, tmp_path, monkeypatch, capsys):
    path, (a, _) = tmp_path / "j", map(Path, next(zip(*clips)))
    judge_both(path, clips)
    with monkeypatch.context() as patch:  # what has its size and time is not read
        patch.setattr(journals, "digest", None)
        assert judge_both(path, clips) == {"a.mp4": "a.mp4", "b.mp4": "b.mp4"}
    os.utime(a, (1, 1))  # copied, say: another time, the same content
    before = path.read_bytes()
    judge_both(path, clips)
    assert path.read_bytes() == before and "changed" not in capsys.readouterr().err
    a.write_text("A.mp4")
    assert judge_both(path, clips) == {"a.mp4": "A.mp4", "b.mp4": "b.mp4"}
    said = capsys.readouterr().err
    assert f"{path}: 1 videos have changed since they were judged, and are judged anew" in said
    assert f"(the first: {a})" in said and "going on after 1 of 2" in said
    before = path.read_bytes()
    assert judge_both(path, clips)["a.mp4"] == "A.mp4" and path.read_bytes() == before
    assert "changed" not in capsys.readouterr().err
    a.unlink()  # a clip that is gone is no other clip
    assert judge_both(path, clips) == {"b.mp4": "b.mp4", "a.mp4": "A.mp4"}


def test_a_pair_is_asked_about_anew_where_either_of_its_clips_was_replaced(clips, tmp_path):
    made = MADE | {"together": True}
    (a, _), (b, _) = clips
    for changed in (None, a, b):
        if changed:
            Path(changed).write_text("other")
        journal = Journal(tmp_path / "j", made, [(a, b, "p")])
        assert not journal.records
        journal.add({"videos": [a, b], "prompt": "p", "first": "A", "cot": "about both"})
        journal.lock.close()
        again = Journal(tmp_path / "j", made, [(a, b, "p")])
        assert again.records == {(a, b, "p"): {"videos": [a, b], "prompt": "p", "first": "A",
                                               "cot": "about both"}}
        again.lock.close()


def test_a_clip_that_is_replaced_while_it_is_judged_is_judged_again(clips, tmp_path, capsys):
    journal, (a, _) = Journal(tmp_path / "j", MADE, clips), clips
    Path(a[0]).write_text("other")
    journal.add({"video": a[0], "prompt": "p", "cot": "of either"})
    journal.lock.close()
    assert judge_both(tmp_path / "j", clips)["a.mp4"] == "other"
    assert "1 videos have changed" in capsys.readouterr().err


def test_records_of_before_are_kept_with_a_warning(clips, tmp_path, capsys):
    lines = [{"made_by": MADE}, *({"video": video, "prompt": "p", "cot": "old"} for video, _ in clips)]
    (tmp_path / "j").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert judge_both(tmp_path / "j", clips) == {"a.mp4": "old", "b.mp4": "old"}
    said = capsys.readouterr().err
    assert f"warning: {tmp_path / 'j'}: 2 judgements do not say what their videos were" in said


def test_what_a_record_says_of_its_file_must_make_sense(clips, tmp_path):
    for file in ("x", {}, {"size": 1}):
        line = {"video": clips[0][0], "prompt": "p", "cot": "c", "files": [file]}
        (tmp_path / "j").write_text(json.dumps({"made_by": MADE}) + "\n" + json.dumps(line) + "\n")
        with pytest.raises(DataError, match="row 2: not of this command"):
            Journal(tmp_path / "j", MADE, clips)


def test_evaluation_and_dpo_pairs_do_not_hand_out_the_scores_of_other_clips(model, keys, tmp_path):
    """infer.py --out and tools.pairs judge by the same function."""
    clips = [(str(tmp_path / f"{name}.mp4"), "a red circle") for name in "ab"]
    for (place, _), (video, _) in zip(clips, keys):
        shutil.copy(video, place)
    args = Namespace(out=tmp_path / "judged", max_new_tokens=3, temperature=0.0, seed=0, think_tokens=10**4,
                     samples=1, cot="on", pairs="pairs.jsonl", workers=0, repetition_penalty=None)
    thinking = infer.read_thinking(args)
    before = infer.judge_all(model, clips, thinking, args, ALONE)
    for (place, _), (video, _) in zip(clips, keys[1::-1]):
        shutil.copy(video, place)
    after = infer.judge_all(model, clips, thinking, args, ALONE)
    a, b = clips
    assert before[a]["score"] != before[b]["score"]
    assert (after[a]["score"], after[b]["score"]) == pytest.approx((before[b]["score"], before[a]["score"]))
    again = infer.judge_all(model, clips, thinking, args, ALONE)
    assert "files" not in tables.describe(model, again[a])


def test_annotation_by_a_bare_backbone_goes_on_with_other_random_weights(
        world_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [
        "annotate", str(world_dir / "test_id.jsonl"), str(tmp_path / "out.jsonl"), "--model", str(BACKBONE),
        "--max-new-tokens", "3", "--think-tokens", "500"])
    judge, kill = infer.judge, [True]

    def killed(*args, **kwargs):
        for number, record in enumerate(judge(*args, **kwargs)):
            if kill[0] and number == 3:
                raise KeyboardInterrupt
            yield record

    monkeypatch.setattr(infer, "judge", killed)
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        annotating.main()
    torch.manual_seed(2)
    kill[0] = False
    with pytest.raises(SystemExit) as ended:
        annotating.main()
    assert ended.value.code == 0 and "going on after 3 of 8 videos" in capsys.readouterr().err
    assert len(read_pairs(tmp_path / "out.jsonl")) == 4


def test_what_thinks_and_what_scores_are_told_apart():
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(load(BACKBONE))
    one, two = models
    assert fingerprint(one) != fingerprint(two) and fingerprint(one, False) == fingerprint(two, False)
    assert fingerprint(one, False) != fingerprint(one)
    two.qwen.lm_head.weight.data[0, 0] += 1e-3
    assert fingerprint(one, False) != fingerprint(two, False)


# ------------------------------------------------------------------------------------------------------------
# The demo


def test_the_model_that_the_stages_left_comes_before_the_demos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run_folder in ("runs/demo/coldstart", "runs/demo/rl", "runs/coldstart", "runs/rl"):
        (tmp_path / run_folder / "model").mkdir(parents=True)
        assert default_model() == run_folder


# Stands for a stage, and for infer.py.
STAGE = """
import json, pathlib, sys
with open("commands", "a") as file:
    print(json.dumps(sys.argv), file=file)
if "--out" in sys.argv:
    out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
    if (out / "other").exists() and "false" not in sys.argv:
        sys.exit(f"error: {out}: model.py has changed since step 3. Or --resume false starts anew")
    if (out / "broken").exists():
        sys.exit("error: something else")
    out.mkdir(parents=True, exist_ok=True)
    names = ("accuracy", "accuracy_no_cot", "accuracy_reading", "quality", "format_rate")
    figures = {f"{test}/{name}": 0.5 for test in ("test_id", "test_ood", "test_trap") for name in names}
    (out / "metrics.jsonl").write_text(json.dumps(figures) + "\\n")
"""


@pytest.fixture
def demo_of_stages(world_dir, tmp_path, monkeypatch):
    """The demo with stages that only say how they were called."""
    for name in ("coldstart.py", "rl.py", "infer.py"):
        (tmp_path / name).write_text(STAGE)
    (tmp_path / "runs/toy").mkdir(parents=True)
    (tmp_path / "runs/toy/train_cots.jsonl").touch()
    for test in demo.TESTS:
        shutil.copy(world_dir / "test_id.jsonl", tmp_path / f"runs/toy/{test}.jsonl")
    (tmp_path / "runs/demo/rl").mkdir(parents=True)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    return tmp_path


def commands_in(folder):
    return [json.loads(line) for line in (folder / "commands").read_text().splitlines()]


def test_the_demo_begins_a_stage_anew_in_its_own_folders_where_something_differs(
        demo_of_stages, tmp_path, monkeypatch, capfd):
    (tmp_path / "runs/demo/rl/other").touch()
    monkeypatch.setattr(prepare, "RANKS", 1)
    demo.main()
    commands = commands_in(tmp_path)
    stage1 = ["coldstart.py", "--out", "runs/demo/coldstart"]
    stage2 = ["rl.py", "--model", "runs/demo/coldstart", "--out", "runs/demo/rl"]
    assert commands[:3] == [stage1, stage2, [*stage2, "--resume", "false"]] and len(commands) == 4
    assert all(words[:3] == ["infer.py", "--model", "runs/demo/rl"] for words in commands[3:])
    assert "error: runs/demo/rl: model.py has changed since step 3." in capfd.readouterr().err
    assert json.loads((tmp_path / "runs/demo/figures.json").read_text())["stage 2"]["score"]["test_id"] == 0.5
    (tmp_path / "runs/demo/coldstart/broken").touch()
    with pytest.raises(subprocess.CalledProcessError):
        demo.main()
    assert len(commands_in(tmp_path)) == 5


@pytest.mark.slow
def test_a_stage_of_two_ranks_is_begun_anew_too(demo_of_stages, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "RANKS", 2)
    (tmp_path / "runs/demo/rl/other").touch()
    demo.run_stage("rl.py", "--out", "runs/demo/rl")
    assert commands_in(tmp_path)[-2:] == [["rl.py", "--out", "runs/demo/rl", "--resume", "false"]] * 2
