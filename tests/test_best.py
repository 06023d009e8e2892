"""The model of the best evaluation, kept beside the last: which it is, and over kills, ranks and shards."""

import json
import math
import os
import re
import signal
import sys

import pytest
import torch
from conftest import ROOT, TOY_VIDEO
from launch import run, run_ranks
from safetensors.torch import load_file

import coldstart
from data import DataError, Pairs
from model import DeScore
from support.ranks import ALONE
from support.run import Run, prepare
from support.settings import parse_args

QUICK = ["--model", ROOT / "toy/backbone", *TOY_VIDEO, "--workers", 0, "--no-gradient-checkpointing",
         "--max-new-tokens", 5, "--save-every", 1, "--keep", 99, "--eval-every", 1]
# What the evaluations say, by step: a best one, another as good, none that is a number, and a worse one.
VALUES = [0.5, None, 0.7, 0.7, None, 0.6]
# A stage whose evaluations say what it is told; it dies between the evaluation and the checkpoint of a step.
SCRIPT = "tests/test_best.py"


def stage1(world_dir, out, *extra):
    return ["--train", world_dir / "train_cots.jsonl", "--test", world_dir / "test_id.jsonl", "--out", out,
            "--batch-size", 4, "--epochs", 1, "--lr", 1e-2, *QUICK, *extra]


def stage2(world_dir, out, *extra):
    return ["--train", world_dir / "train.jsonl", "--test", world_dir / "test_id.jsonl", "--out", out,
            "--batch-size", 2, "--steps", 3, "--updates", 1, "--group-size", 2, "--lr", 1e-2, *QUICK, *extra]


STAGES = {"coldstart": stage1, "rl": stage2}
LORA, FULL = ("--lora-rank", 4), ("--lora-rank", 0)


def scripted(stage, figure, values, world_dir, out, *extra, dies=None):
    """The command of a stage with such evaluations."""
    told = json.dumps({"figure": figure, "values": values, "dies": dies})
    return [SCRIPT, stage, told, *STAGES[stage](world_dir, out, "--keep-best", figure, *extra)]


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def info(folder):
    return json.loads((folder / "descore.json").read_text())


def weights(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in
            load_file(path).items()}


def is_of_step(out, step):
    """Whether the query and the head in best/ are those of this step's checkpoint."""
    kept = load_file(out / f"checkpoints/step-{step}/rank-0.safetensors")
    found = load_file(out / "best/descore.safetensors")
    return all(torch.equal(found[name], kept[f"weight/{name}"]) for name in ("query", "head.weight"))


def test_the_best_evaluation_of_a_run_is_kept_as_a_model(world_dir, tmp_path):
    out = tmp_path / "out"
    name = "test_id/score_std"
    done = run("coldstart.py", *stage1(world_dir, out, *LORA, "--keep-best", name))
    found = [record for record in records(out) if name in record]
    assert [record["step"] for record in found] == [0, 1, 2, 3]
    best = max(found, key=lambda record: record[name])  # the first of equal ones
    about = info(out / "best")
    assert about["best"] == {"step": best["step"], "figure": name, "value": best[name], "test": "test_id"}
    lines = re.findall(rf"^{out}/best: step (\d+), {name} ([\d.]+) \(chosen on test 'test_id'\)$",
                       done.stdout, re.MULTILINE)
    step, value = lines[-1]
    assert int(step) == best["step"] and float(value) == pytest.approx(best[name], rel=1e-3)
    assert best["step"] > 0 and is_of_step(out, best["step"])
    assert about["score_std"] == best[name] and about["score_mean"] == best["test_id/score_mean"]
    assert len(about["score_quantiles"]) == 101 and about["stage"] == "coldstart"
    last = info(out / "model")
    assert "best" not in last and last["score_std"] == found[-1][name]
    # It is judged as it was in the evaluation.
    judged = run("infer.py", "--pairs", world_dir / "test_id.jsonl", "--model", out / "best",
                 "--temperature", 1, "--max-new-tokens", 5, "--json")
    assert json.loads(judged.stdout)["score_std"] == pytest.approx(best[name], rel=1e-5)
    # What goes on from it was chosen by nothing.
    model = DeScore.load(out / "best", device="cpu")
    model.set_trainable(4)
    prepare(model, coldstart.Args(gradient_checkpointing=False), ALONE)
    assert "best" not in model.info


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["coldstart", "rl"])
def test_a_kill_changes_nothing_of_what_is_best(stage, world_dir, tmp_path):
    """Killed when the best was written, and its checkpoint not yet; and a run without it ends alike."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(*scripted(stage, "test_id/mine", VALUES, world_dir, whole, *LORA))
    best = {"step": 2, "figure": "test_id/mine", "value": 0.7, "test": "test_id"}
    assert info(whole / "best")["best"] == best and is_of_step(whole, 2)
    done = run(*scripted(stage, "test_id/mine", VALUES, world_dir, killed, *LORA, dies=2), check=False)
    assert done.returncode == -signal.SIGKILL and info(killed / "best")["best"] == best
    assert not (killed / "checkpoints/step-2").exists()
    done = run(*scripted(stage, "test_id/mine", VALUES, world_dir, killed, *LORA))
    assert "going on after step 1" in done.stdout and f"{killed}/best: " not in done.stdout
    assert info(killed / "best")["best"] == best
    for folder in ("best", "model"):
        one, other = weights(whole / folder), weights(killed / folder)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    # Anew, with another figure, of which less is better; what is not to go on is gone.
    loss = "test_id/loss_of_mine"
    run(*scripted(stage, loss, [0.2, 0.3, 0.2, 0.4], world_dir, killed, *LORA, "--resume", "false"))
    assert info(killed / "best")["best"] == {"step": 0, "figure": loss, "value": 0.2, "test": "test_id"}
    run(*scripted(stage, loss, [None] * 4, world_dir, killed, *LORA, "--resume", "false"))
    assert not (killed / "best").exists() and (killed / "model").is_dir()
    one, other = weights(whole / "model"), weights(killed / "model")
    assert all(torch.equal(one[name], other[name]) for name in one)
    # With another figure than before what is there is no measure.
    run(*scripted(stage, loss, [None, None, None, 9.0], world_dir, whole, *LORA))
    assert info(whole / "best")["best"] == {"step": 3, "figure": loss, "value": 9.0, "test": "test_id"}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "extra"), [("coldstart", LORA), ("rl", LORA), ("coldstart", (
    *FULL, "--shard", "full")), ("rl", (*FULL, "--shard", "full"))])
def test_ranks_keep_what_one_keeps(stage, extra, world_dir, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    first, second = run_ranks(2, *scripted(stage, "test_id/mine", VALUES, world_dir, two, *extra))
    assert f"{two}/best: step 2, test_id/mine 0.7 (chosen on test 'test_id')" in first.stdout
    assert "best" not in second.stdout and is_of_step(two, 2)
    if stage == "coldstart":  # what ranks of stage 2 draw depends on their number
        run(*scripted(stage, "test_id/mine", VALUES, world_dir, one, *extra[:2]))
        # Of shards, weights that are tied are both written.
        assert weights(one / "best").keys() <= weights(two / "best").keys()
        assert info(one / "best")["best"] == info(two / "best")["best"]
    assert DeScore.load(two / "best", device="cpu").has_head


def test_what_names_no_figure_is_refused(world_dir, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for extra, named in ((["--keep-best", "accuracy"], "accuracy needs"),
                         (["--keep-best", "other/accuracy"], "other/accuracy needs"),
                         (["--keep-best", "test_id/accuracy", "--eval-every", "0"], "needs --eval-every")):
        monkeypatch.setattr(sys, "argv", ["coldstart.py", *map(str, stage1(world_dir, out)), *extra])
        with pytest.raises(DataError, match=f"{named}.*of a test set: test_id/accuracy"):
            parse_args(coldstart.Args, "coldstart")
    monkeypatch.setattr("signal.signal", lambda *handler: None)
    args = coldstart.Args(out=str(out), test=["test_id.jsonl"], eval_every=1, keep_best="test_id/acuracy")
    kept = Run(args, "coldstart", ALONE)
    message = "test_id/acuracy: evaluations have no such figure, but test_id/quality"
    with pytest.raises(DataError, match=message):
        kept.save_if_best(0, None, {"test_id/quality": 1.0})
    assert not (out / "best").exists()


def test_a_scale_is_of_the_evaluation_that_was_made_last(tmp_path, monkeypatch):
    """Which may have read no video."""
    monkeypatch.setattr("signal.signal", lambda *handler: None)
    made = Run(coldstart.Args(out=str(tmp_path), keep_rollouts=0), "coldstart", ALONE)
    found = [{"a/score_mean": 1.0, "a/score_std": 2.0}, {"a/unreadable": 1}]

    def evaluate(model, tests, ranks, thinking, workers, judged):
        judged["a"] = {("v", "p"): {"score": 1.0}}
        return found.pop(0)

    monkeypatch.setattr("support.run.evaluate", evaluate)
    made.evaluate(1, None, {"a": Pairs(tmp_path)})
    assert made.scale == {"score_mean": 1.0, "score_std": 2.0, "score_quantiles": [1.0] * 101}
    made.evaluate(2, None, {"a": Pairs(tmp_path)})
    assert made.scale == {}


def main():
    """A stage as a command, with evaluations that say what the first argument says."""
    import importlib

    stage = sys.argv.pop(1)
    told = json.loads(sys.argv.pop(1))
    go_on = Run.asked_to_stop

    def evaluate(self, step, model, tests):
        value = told["values"][step]
        figures = {told["figure"]: math.nan if value is None else value}
        self.log({"step": step, **figures})
        self.last_step = step
        return figures

    def asked_to_stop(self):
        if told["dies"] == self.last_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return go_on(self)

    Run.evaluate, Run.asked_to_stop = evaluate, asked_to_stop
    importlib.import_module(stage).main()


if __name__ == "__main__":
    main()
