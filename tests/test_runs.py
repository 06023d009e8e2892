"""Runs that are killed, stopped, started twice, out of space; on many processes, sharded, in 4 and 8 bits."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOY_VIDEO
from launch import Started, run, run_ranks
from safetensors.torch import load_file

from data import read_pairs

QUICK = [*TOY_VIDEO, "--workers", 0, "--max-new-tokens", 40, "--lr", 1e-3]
LORA, FULL = ("--lora-rank", 4), ("--lora-rank", 0, "--lr", 1e-4)


def command(stage, world_dir, out, *extra):
    """A short run of a stage: coldstart takes 3 steps of 4 pairs, rl 3 steps of 3 pairs, a pair at a time."""
    model = ["--model", ROOT / "toy/backbone", "--out", out]
    if stage == "coldstart":
        return ["coldstart.py", *model, "--train", world_dir / "train_cots.jsonl", "--epochs", 1,
                "--batch-size", 4, "--max-tokens", 1, *QUICK, *extra]
    return ["rl.py", *model, "--train", world_dir / "train.jsonl", "--steps", 3, "--batch-size", 3,
            "--group-size", 2, "--updates", 1, "--think-tokens", 700, *QUICK, *extra]


def torchrun(processes, *arguments):
    return ["-m", "torch.distributed.run", "--nnodes", 1, "--rdzv_backend", "c10d", "--rdzv_endpoint",
            "localhost:0", "--nproc_per_node", processes, *arguments]


def metrics(out):
    """The log without the times."""
    return [{key: value for key, value in json.loads(line).items() if not key.startswith("seconds")}
            for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out):
    return {name: tensor for path in sorted((out / "model").glob("*.safetensors"))
            for name, tensor in load_file(path).items()}


def assert_same(one, other):
    assert metrics(one) == metrics(other)
    assert (one / "rollouts.jsonl").read_bytes() == (other / "rollouts.jsonl").read_bytes()
    assert weights(one).keys() == weights(other).keys()
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


def assert_close(one, other):
    """Equal up to rounding, which Adam amplifies where gradients are next to zero."""
    for name, tensor in weights(one).items():
        assert (tensor.double() - weights(other)[name].double()).norm() <= 5e-3 * tensor.double().norm(), name
    for key, tolerance in (("loss", 1e-4), ("grad_norm", 2e-3)):
        assert [record[key] for record in metrics(one) if key in record] == pytest.approx(
            [record[key] for record in metrics(other) if key in record], rel=tolerance, abs=tolerance), key


@pytest.fixture(scope="module")
def whole(world_dir, tmp_path_factory):
    """Each stage's run, never disturbed, by name."""
    found = {}

    def get(stage, *extra):
        if (stage, extra) not in found:
            found[stage, extra] = tmp_path_factory.mktemp(stage)
            run(*command(stage, world_dir, found[stage, extra], *extra))
        return found[stage, extra]

    return get


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition() and process.running() and time.time() < end:
        time.sleep(0.005)


@pytest.mark.parametrize("stage", ["coldstart", "rl"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(stage, world_dir, whole, tmp_path):
    arguments = command(stage, world_dir, tmp_path, *LORA, "--save-every", 1, "--keep", 1)
    rng = random.Random(0)
    for step in (1, 2):  # killed somewhere in or after the saving of a checkpoint
        process = Started(*arguments)
        wait_for(lambda step=step: any((tmp_path / "checkpoints").glob(f"step-{step}*")), process)
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.wait()
    done = run(*arguments)
    assert "going on after step" in done.stdout
    assert_same(whole(stage, *LORA), tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_the_step(number, world_dir, whole, tmp_path):
    arguments = command("coldstart", world_dir, tmp_path, *LORA)
    process = Started(*arguments)
    wait_for(lambda: (tmp_path / "metrics.jsonl").is_file()
             and '"step": 1' in (tmp_path / "metrics.jsonl").read_text(), process)
    os.kill(process.pid, number)
    done = process.wait()
    assert done.returncode == 0, done.stderr
    assert "stopped after step" in done.stdout and "the same command goes on from here" in done.stdout
    assert not (tmp_path / "model").exists()
    run(*arguments)
    assert_same(whole("coldstart", *LORA), tmp_path)


def test_a_broken_checkpoint_is_passed_over(world_dir, whole, tmp_path):
    shutil.copytree(whole("coldstart", *LORA), tmp_path / "run")
    arguments = command("coldstart", world_dir, tmp_path / "run", *LORA, "--save-every", 1)
    shutil.rmtree(tmp_path / "run/checkpoints")
    run(*arguments)
    newest = tmp_path / "run/checkpoints/step-3/rank-0.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    (tmp_path / "run/checkpoints/step-7.partial").mkdir()  # left by a run killed while saving
    done = run(*arguments)
    assert "step-3: passed over, it is broken" in done.stderr and "going on after step 2" in done.stdout
    assert_same(whole("coldstart", *LORA), tmp_path / "run")
    assert not list((tmp_path / "run/checkpoints").glob("*.partial"))


def test_other_settings_stop_with_the_difference(world_dir, whole, tmp_path):
    shutil.copytree(whole("coldstart", *LORA), tmp_path / "run")
    arguments = command("coldstart", world_dir, tmp_path / "run", *LORA, "--weight-decay", 0.3)
    done = run(*arguments, check=False)
    assert done.returncode == 1 and "--weight-decay was 0.01, is 0.3" in done.stderr
    assert weights(tmp_path / "run").keys() == weights(whole("coldstart", *LORA)).keys()
    assert "going on" not in run(*arguments, "--resume", "false").stdout


def test_a_second_run_on_the_same_folder_refuses(world_dir, tmp_path):
    arguments = command("coldstart", world_dir, tmp_path, *LORA)
    process = Started(*arguments)
    wait_for(lambda: (tmp_path / "skipped.jsonl").is_file(), process)
    second = run(*arguments, check=False)
    process.kill()
    process.wait()
    assert second.returncode == 1 and "another run is at work here" in second.stderr


def test_a_full_disk_leaves_no_broken_checkpoint(world_dir, tmp_path):
    arguments = command("coldstart", world_dir, tmp_path, "--lora-rank", 16, "--save-every", 1)
    done = Started(*arguments, largest_file=300_000).wait()  # a checkpoint has more bytes
    assert done.returncode == 1 and "could not be written" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_an_unwritable_folder_is_known_at_the_start(world_dir, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(*command("coldstart", world_dir, tmp_path / "file/run", *LORA), check=False)
    assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("stage", "processes", "extra"), [
    ("coldstart", 3, LORA), ("rl", 3, LORA), ("coldstart", 3, FULL), ("rl", 3, FULL)])
def test_processes_train_like_one(stage, processes, extra, world_dir, whole, tmp_path):
    """With three, ranks hold unequal numbers of pairs: 4 a step in stage 1."""
    run_ranks(processes, *command(stage, world_dir, tmp_path, *extra))
    assert_close(whole(stage, *extra), tmp_path)


@pytest.mark.parametrize(("stage", "extra"),
                         [("coldstart", ()), ("rl", ()), ("rl", ("--train-merger", "true"))])
def test_sharded_training_is_the_same(stage, extra, world_dir, whole, tmp_path):
    """Three pairs for two ranks: one is idle for a turn in each step of stage 2. The test set is odd too."""
    extra = (*FULL, *extra, "--test", world_dir / "test_id.jsonl")
    sharded = command(stage, world_dir, tmp_path, *extra, "--shard", "full")
    run_ranks(2, *sharded)
    assert_close(whole(stage, *extra), tmp_path)
    before, after = (next(record for record in metrics(out) if "test_id/quality" in record)
                     for out in (whole(stage, *extra), tmp_path))
    assert before == pytest.approx(after, rel=1e-4)
    done, _ = run_ranks(2, *sharded)
    assert "going on after step 3" in done.stdout
    assert_close(whole(stage, *extra), tmp_path)


def test_a_rank_that_dies_is_brought_back(world_dir, whole, tmp_path):
    process = Started(*torchrun(2, "--max-restarts", 1,
                                *command("coldstart", world_dir, tmp_path, *LORA, "--save-every", 1)))
    wait_for(lambda: (tmp_path / "checkpoints/step-1").is_dir(), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    done = process.wait()
    assert done.returncode == 0 and "going on after step" in done.stdout, done.stderr[-3000:]
    assert_close(whole("coldstart", *LORA), tmp_path)


def test_a_restarted_rank_does_not_look_for_a_dead_one(tmp_path):
    """torchrun's store outlives a restart, and with it the addresses of the ranks before it."""
    (tmp_path / "ranks.py").write_text(f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from support.ranks import Ranks
late = os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
time.sleep(3 * late)  # time for the other to find what was there before
ranks = Ranks.start()
total = ranks.sum([1.0])
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and not ranks.first:
    os._exit(1)
print("together " + str(ranks.sum(total)), flush=True)
ranks.stop()
""")
    done = Started(*torchrun(2, "--max-restarts", 1, tmp_path / "ranks.py")).wait(90)
    assert done.returncode == 0 and done.stdout.count("together [4.0]") == 2, done.stderr[-3000:]


@pytest.mark.parametrize("stage", ["coldstart", "rl"])
def test_4_bit_weights_and_8_bit_moments(stage, world_dir, whole, tmp_path):
    small = (*LORA, "--quant", "4bit", "--optim", "adamw8bit", "--save-every", 1)
    run(*command(stage, world_dir, tmp_path / "a", *small))
    losses = [record["loss"] for record in metrics(tmp_path / "a") if "loss" in record]
    plain = [record["loss"] for record in metrics(whole(stage, *LORA)) if "loss" in record]
    assert len(losses) == 3 and losses != plain
    shutil.rmtree(tmp_path / "a/checkpoints/step-3")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    run(*command(stage, world_dir, tmp_path / "b", *small))  # goes on from step 2, with the 8-bit state
    assert_same(tmp_path / "a", tmp_path / "b")
    done = run(*command(stage, world_dir, tmp_path / "c", *FULL, "--quant", "4bit"), check=False)
    assert done.returncode == 1 and "--quant needs --lora-rank" in done.stderr


def test_evaluation_does_not_depend_on_the_number_of_processes(world_dir, whole, tmp_path):
    pairs = read_pairs(world_dir / "test_id.jsonl")
    assert len({key for pair in pairs for key in pair.videos()}) == 8  # 3 + 3 + 2
    test = ("--test", world_dir / "test_id.jsonl", "--eval-tokens", 400)
    run_ranks(3, *command("coldstart", world_dir, tmp_path, *LORA, *test))
    one, three = (next(record for record in metrics(out) if "test_id/quality" in record)
                  for out in (whole("coldstart", *LORA, *test), tmp_path))
    assert one == pytest.approx(three, rel=1e-4)
