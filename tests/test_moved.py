"""What docs/moved.md says of old names, runs, models and copies: each row of its table is tried.

tests/golden/earlier_run, earlier_model and earlier_client are what code from before the move has made: two
steps of stage 1 and judgements of its pairs, a saved model, and what a trainer has copied."""

import importlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, TOY_VIDEO
from launch import Started, run

import coldstart
import rl
from infer import Thinking, judge, reward
from model import DeScore
from support.command import Temperature, TopP
from support.settings import parse_args
from tools import memory
from tools.adapters import flow_grpo
from tools.client import unusable

TABLE = (ROOT / "docs/moved.md").read_text(encoding="utf-8")
ROWS = [line.strip("| ").split(" | ") for line in TABLE.splitlines() if line.startswith("| ")][2:]
GOLDEN = ROOT / "tests/golden"
CASES = {}


def case(beginning):
    """A function that tries the row whose old name begins so, given the names in its cells."""
    def keep(function):
        CASES[beginning] = function
        return function

    return keep


def case_of(row):
    return [function for beginning, function in CASES.items() if row[0].startswith(beginning)]


def test_each_row_has_a_case_and_each_case_a_row():
    assert all(len(row) == 3 and len(case_of(row)) == 1 for row in ROWS)
    assert len(ROWS) == len(CASES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_a_row(row, tmp_path):
    old, new, _ = (re.findall(r"`([^`]+)`", cell) for cell in row)
    (try_row,) = case_of(row)
    try_row(old, new, tmp_path)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------
# Names


@case("`python -m support.annotate`")
def commands_run_the_new_ones(old, new, tmp_path):
    names = [old[0].rpartition(".")[2], *old[1:]]
    assert len(names) == 8
    started = [Started("-m", f"support.{name}", "--help") for name in names]
    for name, process in zip(names, started):
        done = process.wait()
        first = importlib.import_module(f"tools.{name}").__doc__.split("\n")[0]
        assert done.returncode == 0 and first[:40] in done.stdout, done.stderr
    pairs = GOLDEN / "earlier_run/train.jsonl"
    for room in ("support", "tools"):
        run("-m", f"{room}.convert", pairs, tmp_path / f"{room}.jsonl")
    assert (tmp_path / "support.jsonl").read_text() == (tmp_path / "tools.jsonl").read_text() != ""


@case("`python data.py check`")
def commands_of_data_say_the_new_ones(old, new, tmp_path):
    for command, name in zip(old, ("check", "convert")):
        done = run(*command.split()[1:], "pairs.jsonl", check=False)
        assert done.returncode == 2 and re.search(rf"python -m (support|tools)\.{name}\b", done.stderr)


@case("`import support.client`")
def imports_give_the_new_modules(old, new, tmp_path):
    names = [old[0].rpartition(".")[2], *old[1:]]
    assert len(names) == 11
    code = "".join(f"import support.{name}, tools.{name}\nfrom support import {name}\n"
                   f"assert support.{name} is tools.{name} is {name}\n" for name in names)
    (tmp_path / "imports.py").write_text(code)
    run(tmp_path / "imports.py")


@case("`support.forgiving`")
def modules_without_a_stub_are_gone(old, new, tmp_path):
    for name in old:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
        importlib.import_module(name.replace("support.", "tools."))


@case("`write_pairs`")
def names_of_formats_have_moved(old, new, tmp_path):
    *names, module = old
    for name in names:
        assert hasattr(importlib.import_module(new[0]), name)
        assert not hasattr(importlib.import_module(module), name)


@case("`from infer import")
def infer_still_gives_them(old, new, tmp_path):
    (tmp_path / "imports.py").write_text(
        f"{old[0]}\nimport {new[0]} as new\nassert (reward, Scorer) == (new.reward, new.Scorer)\n")
    run(tmp_path / "imports.py")


@case("`--preset support/release.json`")
def the_old_preset_is_the_new_one(old, new, tmp_path):
    for stage in (coldstart, rl):
        found = []
        for flags in (old[0].split(), ["--preset", new[0]]):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.argv", ["x", *flags, "--train", "x", "--model", "x"])
                args = parse_args(stage.Args, stage.__name__)
            args.preset = None
            found.append(args)
        assert found[0] == found[1] and found[0].fps == 2.0


@case("`pip install -r support/requirements.txt`")
def the_old_requirements_name_the_new_ones(old, new, tmp_path):
    file = ROOT / old[0].split()[-1]
    named = [line.split() for line in file.read_text().splitlines() if not line.startswith("#")]
    assert [(flag, (file.parent / path).resolve()) for flag, path in named] == [("-r", ROOT / new[0])]


@case("`bench/claims.py`")
@case("`toy/post_train.py`")
@case("`bench/mutants.py`")
def files_have_moved(old, new, tmp_path):
    folder = ROOT / new[0] if new[0].endswith("/") else (ROOT / new[0]).parent
    room = ROOT / old[0].partition("/")[0]
    for name in old:
        assert not (room / Path(name).name).exists() and (folder / Path(name).name).is_file()
    if "post_train" in old[0]:
        assert f"python {new[0]}" in (ROOT / "Makefile").read_text()


@case("`coldstart.py --mask expected`")
def a_flag_has_become_a_command(old, new, tmp_path):
    script, *flag = old[0].split()
    done = run(script, "--train", "x", "--model", "x", *flag, check=False)
    assert done.returncode == 2 and "error: ambiguous option: --mask" in done.stderr
    script, way = new[0].split()
    usage = run(script, check=False).stderr
    assert way in usage


@case("`model.score(batch, cots, without_cot=True)`")
def a_keyword_is_gone(old, new, tmp_path):
    assert "without_cot" not in inspect.signature(DeScore.score).parameters
    assert list(inspect.signature(DeScore.group).parameters)[1:4] == ["batch", "tokens", "mask"]


@case("`judge(model, keys, 140)`")
def how_it_thinks_goes_by_name(old, new, tmp_path):
    with pytest.raises(TypeError, match="its fields by name"):
        judge(None, [], 140)
    assert "max_new_tokens=140" in new[0] and Thinking(max_new_tokens=140).max_new_tokens == 140


@case("`data.both`")
@case("`data.explained`")
@case("`model.let_go`")
@case("`support.run.Unit`")
@case("`rl.Rollout`")
@case("`support.frames.import_decord`")
def a_function_has_another_name(old, new, tmp_path):
    for name, is_there in ((old[0], False), (new[0], True)):
        module, _, function = name.rpartition(".")
        assert hasattr(importlib.import_module(module), function) == is_there


@case("`alike`")
def functions_of_batches_have_other_names(old, new, tmp_path):
    *names, module = old
    assert len(names) == len(new)
    for before, now in zip(names, new):
        assert not hasattr(importlib.import_module(module), before)
        assert hasattr(importlib.import_module(module), now)


@case("`Run.steps`")
def the_loop_stands_in_main(old, new, tmp_path):
    *methods, module = old
    for method in methods:
        assert not hasattr(importlib.import_module(module).Run, method.removeprefix("Run."))
    for file in new[1:]:
        main = (ROOT / file).read_text().partition("\ndef main()")[2]
        assert "for step" in main and ".backward()" in main and ".step()" in main


# ------------------------------------------------------------------------------------------------------------
# Rewards


@case("a score from `reward`")
def a_cot_that_was_cut_off_is_an_error(old, new, tmp_path):
    argument, flag = new
    assert argument == "accept_any=True" and flag in run("-m", "tools.serve", "--help").stdout
    model = DeScore.load(GOLDEN / "earlier_model", device="cpu")
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    (refused,) = reward(model, frames, "p", fps=4, max_new_tokens=4)
    (accepted,) = reward(model, frames, "p", fps=4, max_new_tokens=4, accept_any=True)
    assert math.isnan(refused["score"]) and "did not end" in refused["error"]
    assert math.isfinite(accepted["score"]) and accepted["error"] is None


@case("4,096 new tokens")
def a_cot_is_as_long_as_the_model_was_trained_to_write(old, new, tmp_path):
    trained = SimpleNamespace(info={"args": {"max_new_tokens": 700}})
    assert memory.longest_answer(trained) == 700
    for info in ({}, {"args": {"max_new_tokens": 4096}}):
        assert memory.longest_answer(SimpleNamespace(info=info)) == 2048


@case("rewards of `flow_grpo`")
def rewards_are_a_tensor(old, new, tmp_path):
    record = unusable(None) | {"score": 1.5}
    found, _ = flow_grpo(lambda videos, prompts, **how: [record], fps=4)()(torch.zeros(1, 4, 3, 8, 8), ["p"])
    assert found.dtype == torch.float32 and found.tolist() == [1.5]


@case("a temperature below")
def what_nothing_can_be_drawn_at_is_refused(old, new, tmp_path):
    for kind, least in zip((Temperature, TopP), new):
        assert kind(least) == float(least)
        with pytest.raises(ArgumentTypeError, match=f"{least}"):
            kind(str(float(least) / 2))
    assert Temperature("0") == 0


# ------------------------------------------------------------------------------------------------------------
# Runs, models, judgements, copies

FEW = ["--max-new-tokens", 8]
STAGE1 = ["coldstart.py", "--model", "toy/backbone", "--train", "tests/golden/earlier_run/train.jsonl",
          "--epochs", 2, "--batch-size", 1, "--save-every", 2, "--lora-rank", 1, "--train-merger", "false",
          "--lr", 1e-3, "--workers", 0, "--gradient-checkpointing", "false", *FEW, *TOY_VIDEO]


@case("a run whose checkpoints")
def a_run_stops_goes_on_or_begins_anew(old, new, tmp_path):
    expected = lines(GOLDEN / "earlier_run/metrics.jsonl")
    for folder in ("insist", "anew"):
        shutil.copytree(GOLDEN / "earlier_run", tmp_path / folder)
    out = tmp_path / "insist"
    stopped = run(*STAGE1, "--out", out, check=False)
    assert stopped.returncode == 1 and "coldstart.py has changed" in stopped.stderr
    assert "--resume insist goes on all the same, --resume false starts anew" in stopped.stderr
    going = run(*STAGE1, "--out", out, "--resume", "insist")
    assert "going on after step 2" in going.stdout and "coldstart.py has changed" in going.stderr
    assert compared(lines(out / "metrics.jsonl")) == compared(expected)
    run(*STAGE1, "--out", tmp_path / "anew", "--resume", "false")
    assert compared(lines(tmp_path / "anew/metrics.jsonl")) == compared(expected)


def compared(records):
    """Steps and losses; rounding is another on another machine."""
    return [(record["step"], pytest.approx(record.get("loss", 0), rel=1e-3)) for record in records]


@case("a model that earlier code saved")
def a_model_loads_and_scores_as_before(old, new, tmp_path):
    expected = lines(GOLDEN / "earlier_run/judgements.jsonl")[1]
    done = run("infer.py", GOLDEN / "four.mp4", expected["prompt"], "--model", GOLDEN / "earlier_model", *FEW,
               "--json")
    found = json.loads(done.stdout)
    assert found["cot"] == expected["cot"] and found["score"] == pytest.approx(expected["score"], abs=1e-4)


@case("a file of judgements")
def judgements_go_on_behind_earlier_ones(old, new, tmp_path):
    if f"transformers=={transformers.__version__}\n" not in (ROOT / "constraints.txt").read_text():
        pytest.skip("judgements are kept apart by the version of transformers")
    *kept, last = (GOLDEN / "earlier_run/judgements.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_text("".join(kept))
    pairs = "tests/golden/earlier_run/train.jsonl"  # the file's records have paths that begin so
    out = ["--out", tmp_path / "out.jsonl"]
    run("infer.py", "--pairs", pairs, "--model", GOLDEN / "earlier_model", *FEW, *out)
    found = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    assert found[:-1] == kept
    record, expected = json.loads(found[-1]), json.loads(last)
    assert (record["video"], record["cot"]) == (expected["video"], expected["cot"])
    assert record["score"] == pytest.approx(expected["score"], abs=1e-4)


COPY = """
import sys
import numpy, torch
from client import Client
from adapters import flow_grpo
score = Client(sys.argv[1])
frames = torch.from_numpy(numpy.load("frames.npy"))
for record in [*score(frames, "p", fps=4), *score("clip.mp4", "p")]:
    assert record["error"] is None, record
rewards, _ = flow_grpo(score, fps=4)()(frames, ["p"])
(record,) = score(frames, ["p"], fps=4)
assert abs(rewards[0] - record["standardised"]) < 1e-4
"""


@case("a copy of `client.py`")
def a_copy_asks_the_new_server(old, new, tmp_path):
    pytest.importorskip("fastapi")
    for name in ("client.py", "adapters.py"):
        shutil.copy(GOLDEN / "earlier_client" / name, tmp_path)
    (tmp_path / "ask.py").write_text(COPY)
    shutil.copy(GOLDEN / "four.mp4", tmp_path / "clip.mp4")
    np.save(tmp_path / "frames.npy", torch.rand(1, 4, 3, 64, 64).numpy())
    server = Started("-m", "tools.serve", "--model", GOLDEN / "earlier_model", "--port", 0, "--accept-any",
                     *FEW)
    while not (said := re.search(r"http://127\.0\.0\.1:\d+", Path(server.files[0]).read_text())):
        assert server.running(), server.wait()
        time.sleep(0.05)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        subprocess.run([sys.executable, "ask.py", said[0]], check=True, cwd=tmp_path, env=environment)
    finally:
        os.kill(server.pid, signal.SIGTERM)
        server.wait(60)
