"""Settings reach what they are for, and what cannot be read counts for nothing."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TOY_VIDEO
from launch import run
from safetensors.torch import load_file

from rl import Args, make_rewards
from support.optimize import clip
from support.run import PATIENCE

QUICK = [*TOY_VIDEO, "--lora-rank", 4, "--workers", 0, "--eval-before", "false", "--beta", 0.1]


def rl(world_dir, out, *extra):
    """A rollout batch of two pairs, with one update."""
    run("rl.py", "--model", ROOT / "toy/backbone", "--train", world_dir / "train.jsonl", "--out", out,
        "--batch-size", 2, "--updates", 1, "--group-size", 3, "--lr", 0, "--max-new-tokens", 40,
        "--length-low", 1, "--length-high", 99, *QUICK, *extra)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][:-1]


def cots(out):
    records = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    return [[rollout["cot"] for rollout in record["rollouts"]] for record in records]


@pytest.fixture(scope="module")
def hot(world_dir, tmp_path_factory):
    """Two steps at a temperature at which the rollouts of a group differ."""
    out = tmp_path_factory.mktemp("hot")
    return out, rl(world_dir, out, "--steps", 2, "--temperature", 1.7, "--keep-rollouts", 4)


def test_at_any_temperature_the_ratio_is_1_before_the_first_update(hot):
    """Old, new and reference policy are the same model, seen at the same temperature."""
    _, records = hot
    for record in records:
        assert record["clip_fraction"] == 0 and record["kl"] < 1e-8
        assert abs(record["grpo_loss"]) < 1e-5  # −E A = 0
        assert record["entropy"] > 0.1


def test_rollouts_are_drawn_at_the_temperature_and_within_top_p(hot, world_dir, tmp_path):
    assert any(len(set(group)) > 1 for group in cots(hot[0]))
    for name, value in (("--temperature", 0.01), ("--top-p", 0.001)):
        out = tmp_path / name
        rl(world_dir, out, "--steps", 1, "--temperature", 1.7, name, value)
        assert all(len(set(group)) == 1 for group in cots(out)), name


def test_the_length_reward_of_a_run_goes_by_its_settings_and_all_tokens():
    processor = SimpleNamespace(dimensions={"subject": 2}, tags=("think", "answer"))
    args = Args(length_low=10, length_high=30, length_excess=40)
    length = make_rewards(args, processor)["length"].function
    assert [length("whatever it says", n, {}) for n in (10, 20, 30, 40, 50, 60)] == [0, 0.5, 1, 1, 0.5, 0]


def test_the_strict_length_reward_goes_by_the_settings_and_what_the_thought_says():
    processor = SimpleNamespace(dimensions={"subject": 2}, tags=("think", "answer"),
                                encode=str.split)  # a token a word
    args = Args(length_low=10, length_high=30, length_excess=40,
                reward=["presets/strict.py:length_reward=0.2"])
    length = make_rewards(args, processor)["length"].function
    answer, found = '<answer>{"dimensional_scores": {"subject": 2}}</answer>', []
    for n in (10, 20, 30, 40, 50, 60):
        think = " ".join("bcdfghkl"[i // 8] + "amnopqrt"[i % 8] for i in range(n))  # no word twice
        found.append(length(f"<think>{think}</think>{answer}", 999, {}))
    assert found == [0, 0.5, 1, 1, 0.5, 0]


def test_prompts_longer_than_the_limit_are_left_out(world_dir, tmp_path):
    done = run("coldstart.py", "--model", ROOT / "toy/backbone", "--train", world_dir / "train_cots.jsonl",
               "--out", tmp_path, "--max-prompt", 60, *QUICK[:-2], check=False)
    assert done.returncode == 1 and "tokens, more than 60" in done.stderr


def stage_1_on(pairs, tmp_path, *extra, check=True):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return run("coldstart.py", "--model", ROOT / "toy/backbone", "--train", tmp_path / "pairs.jsonl", "--out",
               tmp_path / "out", "--epochs", 1, *QUICK[:-2], *extra, check=check)


@pytest.fixture
def absolute(world_dir):
    pairs = [json.loads(line) for line in (world_dir / "train_cots.jsonl").read_text().splitlines()[:3]]
    return [pair | {key: str(world_dir / pair[key]) for key in ("video_a", "video_b")} for pair in pairs]


def test_a_tie_needs_no_cots_in_stage_1_for_it_is_not_used(absolute, tmp_path):
    tie = {key: absolute[0][key] for key in ("prompt", "video_a", "video_b")} | {"preference": "tie"}
    done = stage_1_on([pair | {"preference": "B"} for pair in absolute] + [tie], tmp_path)
    assert "4 pairs; 1 of them ties" in done.stdout


def test_what_cannot_train_is_refused_before_it_starts(absolute, tmp_path):
    ties = stage_1_on([pair | {"preference": "tie"} for pair in absolute], tmp_path, check=False)
    assert ties.returncode == 1 and "nothing but ties" in ties.stderr
    split = stage_1_on(absolute, tmp_path, "--shard", "full", check=False)  # with LoRA
    assert split.returncode == 1 and "it needs --lora-rank 0" in split.stderr


def test_a_pair_without_a_preference_is_refused_by_row(absolute, tmp_path):
    done = stage_1_on([absolute[0], absolute[1] | {"preference": None}], tmp_path, check=False)
    assert done.returncode == 1 and "row 2: preference is" in done.stderr


def test_judgements_of_an_earlier_version_are_refused_by_row(world_dir, tmp_path):
    pair = json.loads((world_dir / "test_id.jsonl").read_text().splitlines()[0])
    old = {"video": str(world_dir / pair["video_a"]), "prompt": pair["prompt"], "cot": "x", "score": 1.0}
    (tmp_path / "out.jsonl").write_text(json.dumps(old) + "\n")
    done = run("infer.py", "--pairs", world_dir / "test_id.jsonl", "--model", ROOT / "toy/backbone", "--out",
               tmp_path / "out.jsonl", check=False)
    assert done.returncode == 1 and "out.jsonl, row 1: not of this command" in done.stderr


def test_answers_that_cannot_be_read_are_not_thrown_away(world_dir, tmp_path):
    done = run("-m", "tools.annotate", world_dir / "test_id.jsonl", tmp_path / "out.jsonl", "--model",
               ROOT / "toy/backbone", "--max-new-tokens", 5, "--scores", check=False)
    assert done.returncode == 1 and "no pair has CoTs of use" in done.stderr
    assert len((tmp_path / "out.jsonl.cots").read_text().splitlines()) == 1 + 8
    assert not (tmp_path / "out.jsonl").exists()


WRONG = """
import torch
import coldstart
from coldstart import *

read = Run.read
seen = 0


def spoiled(self, updates, videos, model):
    global seen
    seen += 1
    if seen in SPOILED:
        model.head.weight.register_hook(lambda gradient: gradient * VALUE)
    return read(self, updates, videos, model)


Run.read = spoiled
coldstart.main()
"""


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_gradient_that_is_not_finite_changes_nothing_and_five_end_the_run(value, world_dir, tmp_path):
    script = WRONG.replace("SPOILED", "range(2, 9)").replace("VALUE", f"float('{value}')")
    (tmp_path / "wrong.py").write_text(script)
    train = world_dir / "train_cots.jsonl"
    done = run(tmp_path / "wrong.py", "--model", ROOT / "toy/backbone", "--train", train, "--out",
               tmp_path / "out", "--batch-size", 1, "--epochs", 1, "--save-every", 1, "--keep", 9,
               "--lora-rank", 4, *TOY_VIDEO, "--workers", 0, "--lr", 1e-3, "--warmup", 0, check=False)
    assert done.returncode != 0 and f"gradients of {PATIENCE} updates in a row" in done.stderr
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    assert [record["left_out"] for record in records] == [0, 1, 1, 1, 1]
    assert [record["grad_norm"] is None for record in records] == [False, True, True, True, True]
    weights = [load_file(tmp_path / f"out/checkpoints/step-{step}/rank-0.safetensors") for step in (1, 5)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_gradients_are_clipped_to_a_norm_and_what_is_not_finite_stays():
    weight = torch.nn.Parameter(torch.ones(2))
    frozen = torch.nn.Parameter(torch.ones(2))
    for gradient, norm, clipped in (([3.0, 4.0], 5.0, [0.6, 0.8]), ([0.3, 0.4], 0.5, [0.3, 0.4])):
        weight.grad = torch.tensor(gradient)
        assert clip([weight, frozen], 1.0) == pytest.approx(norm)
        assert torch.allclose(weight.grad, torch.tensor(clipped))
    weight.grad = torch.tensor([math.inf, 1.0])
    assert clip([weight], 1.0) == math.inf and weight.grad.tolist() == [math.inf, 1.0]
