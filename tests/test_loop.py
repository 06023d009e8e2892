"""What a researcher changes in the loop is changed in main of the stage, and nowhere else."""

import json
import math

import pytest
import torch
from conftest import ROOT, TOY_VIDEO
from launch import Started, run, run_ranks
from safetensors.torch import load_file

QUICK = ["--model", ROOT / "toy/backbone", *TOY_VIDEO, "--lora-rank", 4, "--workers", 0, "--lr", 1e-3,
         "--no-gradient-checkpointing"]


def edited(stage, folder, *changes, before=""):
    """A copy of a stage in which main says something else: (old line, new lines), each once."""
    text = (ROOT / f"{stage}.py").read_text()
    head, main = text.split("def main() -> None:\n")
    head += before
    for old, new in changes:
        assert main.count(old) == 1, old
        main = main.replace(old, new)
    (folder / f"{stage}.py").write_text(head + "def main() -> None:\n" + main)
    return folder / f"{stage}.py"


def stage1(world_dir, out, *extra):
    return ["--train", world_dir / "train_cots.jsonl", "--out", out, "--batch-size", 4, "--epochs", 2,
            "--test", world_dir / "test_id.jsonl", "--max-new-tokens", 5, "--save-every", 1, *QUICK, *extra]


def records(out, name="metrics"):
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


EMA = [
    ("    done = run.resume(model, optimizer)", """\
    ema = {name: p.detach().clone() for name, p in trainable.items()}
    done = run.resume(model, optimizer, ema=ema)"""),
    ("            optimizer.step()\n", """\
            optimizer.step()
            for name, p in trainable.items():
                ema[name].lerp_(p.detach(), 0.5)
"""),
    ("    run.save_model(model)\n", """\
    model.load_state_dict(ema, strict=False)
    run.save_model(model)
"""),
]


@pytest.mark.slow
def test_an_average_of_the_weights_is_kept_over_a_kill_evaluated_and_saved(world_dir, tmp_path):
    script = edited("coldstart", tmp_path, *EMA)
    run(script, *stage1(world_dir, tmp_path / "whole", "--keep", 9))
    killed = Started(script, *stage1(world_dir, tmp_path / "killed"))
    while killed.running() and not (tmp_path / "killed/checkpoints/step-3").is_dir():
        pass
    killed.kill()
    killed.wait()
    run(script, *stage1(world_dir, tmp_path / "killed"))
    for name in ("descore", "adapter_model"):
        found = [load_file(tmp_path / f"{out}/model/{name}.safetensors") for out in ("whole", "killed")]
        assert all(torch.equal(tensor, found[1][key]) for key, tensor in found[0].items())
    # The average, calculated again from the checkpoints of the whole run.
    steps = sorted((tmp_path / "whole/checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    weights = [load_file(path / "rank-0.safetensors")["weight/head.weight"] for path in steps]
    kept = load_file(steps[0] / "rank-0.safetensors")["ema/head.weight"]
    for weight in weights[1:]:
        kept = (kept + weight) / 2
    saved = load_file(tmp_path / "whole/model/descore.safetensors")["head.weight"]
    torch.testing.assert_close(saved, kept)
    assert (saved - weights[-1]).abs().max() > 1e-5
    scores = [record["test_id/score_mean"] for record in (records(tmp_path / "whole")[-1],
                                                          records(tmp_path / "killed")[-1])]
    assert scores[0] == scores[1]


def test_a_break_ends_a_run_with_its_model_saved_and_evaluated(world_dir, tmp_path):
    script = edited("coldstart", tmp_path, (
        "        stop = run.asked_to_stop()\n",
        "        if step == 2:\n            break\n        stop = run.asked_to_stop()\n"))
    run(script, *stage1(world_dir, tmp_path / "out"))
    found = records(tmp_path / "out")
    assert [record["step"] for record in found if "loss" in record] == [1, 2]
    assert "test_id/accuracy" in found[-1] and found[-1]["step"] == 2
    assert (tmp_path / "out/model/descore.safetensors").is_file()


@pytest.mark.slow
def test_another_optimiser_is_one_line(world_dir, tmp_path):
    script = edited("coldstart", tmp_path, (
        "adamw(groups, args.weight_decay, args.optim)", "torch.optim.SGD(groups, momentum=0.9)"))
    run(script, *stage1(world_dir, tmp_path / "out"))
    state = load_file(next((tmp_path / "out/checkpoints").glob("step-*")) / "rank-0.safetensors")
    assert {name.rpartition("/")[2] for name in state if name.startswith("optimizer/")} == {"momentum_buffer"}


def stage2(world_dir, out):
    return ["--train", world_dir / "train.jsonl", "--out", out, "--steps", 1, "--batch-size", 3,
            "--updates", 1, "--group-size", 4, "--max-new-tokens", 140, "--keep-rollouts", 99,
            "--eval-before", "false", *QUICK]


# Of the whole batch: REINFORCE++ (arXiv 2501.03262), and groups that are filtered by their spread.
GLOBAL = ("group_advantages(R, args.advantage_std)", "(R - R.mean()) / R.std()")
FILTERED = ("group_advantages(R, args.advantage_std)",
            "torch.where(R.std(1, keepdim=True) >= R.std(1).median(), R - R.mean(1, keepdim=True), 0.0)")


@pytest.mark.slow
@pytest.mark.parametrize("change", [GLOBAL, FILTERED])
def test_advantages_over_the_whole_batch_are_those_of_one_process(change, world_dir, tmp_path):
    """Three pairs over two ranks: a spare is in no mean."""
    script = edited("rl", tmp_path, change, before="import recited\n\nrecited.install()\n\n\n")
    run(script, *stage2(world_dir, tmp_path / "one"))
    run_ranks(2, script, *stage2(world_dir, tmp_path / "two"))
    kept = [records(tmp_path / out, "rollouts") for out in ("one", "two")]
    for one, two in zip(*kept, strict=True):
        assert [r["cot"] for r in one["rollouts"]] == [r["cot"] for r in two["rollouts"]]
        for a, b in zip(one["rollouts"], two["rollouts"]):
            assert a["advantage"] == pytest.approx(b["advantage"], abs=1e-6)
    rewards = torch.tensor([[r["reward"] for r in video["rollouts"]] for video in kept[0]])
    advantages = torch.tensor([[r["advantage"] for r in video["rollouts"]] for video in kept[0]])
    assert rewards.shape == (6, 4) and rewards.std() > 0.1
    if change is GLOBAL:
        torch.testing.assert_close(advantages, (rewards - rewards.mean()) / rewards.std())
    else:
        assert 1 <= (advantages == 0).all(1).sum() <= 3
    spread = next(r for r in records(tmp_path / "one") if "loss" in r)["advantage_spread"]
    assert spread == pytest.approx(advantages.abs().mean().item(), rel=1e-5) and math.isfinite(spread)
