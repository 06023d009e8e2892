"""Each row of the README's "To change …, edit …" is a change in one place: it is made in a copy, and a step
of both stages shows it."""

import json
import math
import shutil

import pytest
from conftest import ROOT, TOY_VIDEO
from launch import run
from safetensors.torch import load_file

QUICK = [*TOY_VIDEO, "--lora-rank", 4, "--workers", 0, "--no-gradient-checkpointing", "--lr", 1e-3,
         "--max-new-tokens", 30, "--eval-before", "false"]
HINGE = ("coldstart.py", "-F.logsigmoid(r_w - r_l)", "F.relu(2.0 - (r_w - r_l))")
RANKS = ("rl.py", "    return torch.where(has_signal,",
         """    return rewards.argsort(1).argsort(1).float() * 2
    return torch.where(has_signal,""")
HEAD = ("model.py", """self.head = nn.Linear(text.hidden_size, 1, bias=False)
        nn.init.normal_(self.head.weight, std=text.hidden_size**-0.5)""",
        "self.head = nn.Sequential(nn.Linear(text.hidden_size, 8), nn.Tanh(), nn.Linear(8, 1))")
FIGURES = ("support/run.py", "            append(self.out / f\"{name}.jsonl\", [finite(record)])",
           """            print("elsewhere", sorted(record))
            append(self.out / f"{name}.jsonl", [finite(record)])""")


@pytest.fixture
def changed(world_dir, tmp_path):
    """Make a change in a copy of the project and run a step of each stage; returns their folders' parent, and
    what they printed."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "support", tmp_path / "support")

    def change(file, old, new):
        text = (tmp_path / file).read_text()
        assert text.count(old) == 1
        (tmp_path / file).write_text(text.replace(old, new))
        one = run("coldstart.py", "--model", ROOT / "toy/backbone", "--train", world_dir / "train_cots.jsonl",
                  "--epochs", 1, "--batch-size", 12, "--mask-p", 0, *QUICK, root=tmp_path)
        two = run("rl.py", "--train", world_dir / "train.jsonl", "--steps", 1, "--batch-size", 2, "--updates",
                  1, "--group-size", 3, "--beta", 0, *QUICK, root=tmp_path)
        return tmp_path / "runs", one.stdout + two.stdout

    return change


def step(out):
    record = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert all(value is not None and math.isfinite(value) for value in record.values())
    return record


@pytest.mark.slow
def test_the_pair_loss_is_one_function_for_both_stages(changed):
    runs, _ = changed(*HINGE)
    one, two = step(runs / "coldstart"), step(runs / "rl")
    # Where all margins are below 2 a hinge is 2 less their mean, which log σ never is.
    assert one["loss"] == pytest.approx(2 - one["margin"], abs=1e-5) and two["bt_loss"] > 1


@pytest.mark.slow
def test_the_advantages_are_one_function(changed):
    runs, _ = changed(*RANKS)
    kept = [json.loads(line) for line in (runs / "rl/rollouts.jsonl").read_text().splitlines()]
    for video in kept:
        assert sorted(rollout["advantage"] for rollout in video["rollouts"]) == [0, 2, 4]


@pytest.mark.slow
def test_the_head_is_made_in_one_place_trained_saved_and_loaded(changed):
    runs, _ = changed(*HEAD)
    before, after = (load_file(runs / stage / "model/descore.safetensors") for stage in ("coldstart", "rl"))
    own = {"query", "head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}
    assert before.keys() == after.keys() and {name for name in after if "merger" not in name} == own
    assert all((before[name] != after[name]).any() for name in ("query", "head.0.weight", "head.2.weight"))


@pytest.mark.slow
def test_figures_go_through_one_method(changed):
    _, printed = changed(*FIGURES)
    assert printed.count("elsewhere") == 2 * 2 + 4  # a step and an evaluation each, and four kept videos
