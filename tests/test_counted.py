"""What counts and what does not: a pair that cannot be read, a rank's spare, a rollout that was cut off.

Every figure that a stage logs, and what is in it. Of all of them a pair that cannot be read and a spare are in none:

    loss, accuracy, margin, grad_norm, left_out, lr                                  stage 1: pairs that can be read
    reward, reward_*, reward_range, no_signal, advantage_spread                      stage 2: all rollouts
    cot_tokens, truncated, entropy                                                   all rollouts
    grpo_loss, kl, clip_fraction, ratio_max, logp_gap     the learnt rollouts: with --mask-truncated, those that ended
    bt_loss, bt_accuracy                                               decided pairs, whether their CoTs ended or not
    loss                                                           updates in which a rollout is learnt, or a pair decided
    grad_norm, left_out                                                                                          updates
"""

import json
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TOY_VIDEO
from launch import run, run_ranks
from safetensors.torch import load_file

from coldstart import order
from data import DIMENSIONS
from model import DeScore
from support.run import Skipped

FIGURES = {
    "coldstart": {"loss", "accuracy", "margin", "grad_norm", "left_out", "lr"},
    "rl": {"reward", "reward_format", "reward_quality", "reward_length", "reward_range", "no_signal",
           "advantage_spread", "cot_tokens", "truncated", "entropy", "grpo_loss", "kl", "clip_fraction",
           "ratio_max", "logp_gap", "bt_loss", "bt_accuracy", "loss", "grad_norm", "left_out"}}
COMMON = ["--model", ROOT / "toy/backbone", *TOY_VIDEO, "--lora-rank", 4, "--workers", 0, "--eval-before", "false",
          "--no-gradient-checkpointing", "--save-every", 1]
LR = 1e-3
STAGE1 = ["--epochs", 1, "--mask-p", 0, "--warmup", 1, "--max-tokens", 1400, "--lr", LR]
G = 4
BT_WEIGHT = 0.5
STAGE2 = ["--steps", 1, "--group-size", G, "--max-new-tokens", 58, "--mask-truncated", "true", "--length-low", 20,
          "--length-high", 80, "--beta", 0.1, "--bt-weight", BT_WEIGHT, "--think-tokens", 3000, "--keep-rollouts", 99]
# Rollouts recite (tests/recited.py): two whole CoTs, one that is cut off, and one without an answer.
ANSWER = "<answer>" + json.dumps({"dimensional_scores": dict(zip(DIMENSIONS, (2, 1, "N/A", 2, 0)))}) + "</answer>"
COTS = [f"<think>red red red</think>{ANSWER}", f"<think>seen</think>{ANSWER.replace('2', '1')}",
        f"<think>{'seen red circle, ' * 4}</think>{ANSWER}", "<think>red</think>"]
RECITED = f"""
import recited
import rl
from support.command import run_command

recited.COTS[:] = {COTS}
recited.install()
run_command(rl.main)
"""

# By how many words the prompts of ten pairs are longer, and what is wrong with them. Two ranks take the longest two
# first, then the next two. So in the first step rank 1 alone meets the broken pair, beside a spare of the shortest; in
# the second the broken one is the last, and rank 1's spare repeats it.
WORDS = (12, 6, 24, 0, 18, 12, 6, 24, 0, 0)
WRONG = {4: "b", 9: "ab"}
TIES = {"coldstart": [], "rl": [1]}
STEPS = {"coldstart": [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], "rl": [[0, 1, 2, 3, 4]]}
READABLE = {"coldstart": [[0, 1, 2, 3], [5, 6, 7, 8]], "rl": [[0, 1, 2, 3]]}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_pairs(path, steps, world_dir, broken, ties=()):
    """A pair file such that a run takes these pairs in these steps."""
    rows = lines_of(world_dir / "train_cots.jsonl")
    numbers = [number for step in steps for number in step]
    lines = [""] * len(numbers)
    for number, place in zip(numbers, order(len(numbers), 1, 0)):
        row = rows[number]
        row["prompt"] = "A circle" + " red" * WORDS[number]
        row["preference"] = "tie" if number in ties else "AB"[number % 2]
        for side in "ab":
            is_wrong = side in WRONG.get(number, "")
            row[f"video_{side}"] = str(broken if is_wrong else world_dir / row[f"video_{side}"])
        lines[place] = json.dumps(row) + "\n"
    path.write_text("".join(lines))
    return path


def figures(out):
    """Of each step all that is logged, but for times."""
    found = []
    for record in lines_of(out / "metrics.jsonl"):
        if "loss" in record:
            found.append({name: value for name, value in record.items() if not name.startswith("seconds")})
    return found


def moments(out, step):
    """The mean of the gradients up to a step, as Adam has it, in one vector: it goes by the gradients themselves,
    where the weights go by little more than their signs."""
    state = load_file(out / f"checkpoints/step-{step}/rank-0.safetensors")
    return torch.cat([state[name].flatten() for name in sorted(state) if name.endswith("/exp_avg")])


def weights(out):
    found = {}
    for path in (out / "model").glob("*.safetensors"):
        found |= load_file(path)
    return found


class Runs:
    """Of a stage: a run without the broken pairs, and the same with them, on one rank and on two."""

    def __init__(self, stage, world_dir, folder):
        self.stage = stage
        self.broken = folder / "broken.mp4"
        self.broken.write_bytes(b"not a video" * 100)
        if stage == "coldstart":
            command = ["coldstart.py", *STAGE1]
        else:
            (folder / "recite.py").write_text(RECITED)
            command = [folder / "recite.py", *STAGE2, "--updates", 2, "--lr", LR]
        self.plain = folder / "plain"
        self.one = folder / "one"
        self.two = folder / "two"
        for out, steps in ((self.plain, READABLE), (self.one, STEPS), (self.two, STEPS)):
            train = write_pairs(folder / f"{out.name}.jsonl", steps[stage], world_dir, self.broken, TIES[stage])
            run_ranks(2 if out is self.two else 1, *command, *COMMON, "--train", train, "--out", out,
                      "--batch-size", len(steps[stage][0]), "--max-skipped", 0.2)  # as many are broken


@pytest.fixture(scope="module", params=["coldstart", "rl"])
def runs(request, world_dir, tmp_path_factory):
    return Runs(request.param, world_dir, tmp_path_factory.mktemp(request.param))


def test_a_broken_pair_and_a_spare_are_in_no_figure(runs):
    expected = figures(runs.plain)
    for record in expected:
        assert record.keys() - {"step"} == FIGURES[runs.stage]
    for out in (runs.one, runs.two):
        for found, plain in zip(figures(out), expected, strict=True):
            for name in ("ratio_max", "logp_gap"):  # of rounding
                assert found.pop(name, 0) == pytest.approx(plain.get(name, 0), abs=1e-3)
            assert found == pytest.approx({name: plain[name] for name in found}, rel=1e-3, abs=1e-5), out.name


def test_a_broken_pair_and_a_spare_have_no_gradient(runs):
    expected = weights(runs.plain)
    for out in (runs.one, runs.two):
        for step in range(1, len(STEPS[runs.stage]) + 1):
            apart = moments(out, step) - moments(runs.plain, step)
            assert apart.norm() <= 0.01 * moments(runs.plain, step).norm(), (out.name, step)
        found = weights(out)
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            apart = (found[name] - weight).square().mean().sqrt()
            assert apart <= 0.2 * LR, (out.name, name)


def test_a_broken_pair_is_listed_once_whichever_rank_meets_it(runs):
    assert not (runs.plain / "skipped.jsonl").read_text()
    broken = str(runs.broken)
    for out in (runs.one, runs.two):
        found = lines_of(out / "skipped.jsonl")
        expected = [WRONG[number] for step in STEPS[runs.stage] for number in step if number in WRONG]
        assert [record["videos"].count(broken) for record in found] == [len(wrong) for wrong in expected]
        assert all(record["error"].startswith(f"{broken}: not a video") for record in found)
