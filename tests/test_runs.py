"""Runs that are killed, stopped, started twice, out of space; on many processes, sharded, in 4 and 8 bits."""

import json
import math
import os
import random
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TOY_VIDEO
from launch import Started, run, run_ranks
from safetensors.torch import load_file

import support.checkpoint
import support.run
from data import DataError, read_pairs
from support.batches import split_evenly
from support.checkpoint import Checkpoints, sum_of
from support.files import amend, put_in_place, remove, settle
from support.means import Means
from support.ranks import ALONE, Ranks
from support.run import Run, append, cut
from support.settings import RunArgs

QUICK = [*TOY_VIDEO, "--workers", 0, "--max-new-tokens", 40, "--lr", 1e-3]
REWARD = ["--reward", f"{ROOT / 'tests/recited.py'}:colons=1"]
LORA, FULL = ("--lora-rank", 4), ("--lora-rank", 0, "--lr", 1e-4)


def command(stage, world_dir, out, *extra):
    """A short run of a stage: coldstart takes 3 steps of 4 pairs, rl 3 steps of 3 pairs, a pair at a time.
    Rollouts recite, for what processes draw would depend on their number."""
    model = ["--model", ROOT / "toy/backbone", "--out", out]
    if stage == "coldstart":
        return ["coldstart.py", *model, "--train", world_dir / "train_cots.jsonl", "--epochs", 1,
                "--batch-size", 4, "--max-tokens", 1, *QUICK, *extra]
    return [ROOT / "tests/recited.py", *model, "--train", world_dir / "train.jsonl", "--steps", 3,
            "--batch-size", 3, "--group-size", 2, "--updates", 1, "--think-tokens", 700, *REWARD, *QUICK,
            *extra]


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


@pytest.mark.parametrize("stage", [pytest.param("coldstart", marks=pytest.mark.slow), "rl"])
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


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
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
    done = run(*arguments, "--reader", "decord")  # which shows the same
    assert "going on after step" in done.stdout
    assert_same(whole("coldstart", *LORA), tmp_path)


def test_a_broken_checkpoint_is_passed_over(world_dir, whole, tmp_path):
    shutil.copytree(whole("coldstart", *LORA), tmp_path / "run")
    arguments = command("coldstart", world_dir, tmp_path / "run", *LORA, "--save-every", 1)
    shutil.rmtree(tmp_path / "run/checkpoints")
    done = run(*arguments, check=False)  # a finished model is not replaced without a word
    assert done.returncode == 1 and "holds a model and no checkpoint to go on from" in done.stderr
    shutil.rmtree(tmp_path / "run/model")
    run(*arguments)
    newest = tmp_path / "run/checkpoints/step-3/rank-0.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    for left in ("checkpoints/step-7.partial", "checkpoints/step-1.removed", "checkpoints.removed",
                 "model.removed", "model.replaced", "model.partial"):  # by runs killed at various moments
        (tmp_path / "run" / left).mkdir()
        (tmp_path / "run" / left / "file").write_text("")
    done = run(*arguments)
    assert "step-3: passed over, it is broken" in done.stderr and "going on after step 2" in done.stdout
    assert_same(whole("coldstart", *LORA), tmp_path / "run")
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix in (
        ".partial", ".removed", ".replaced")]


def test_where_no_checkpoint_can_be_used_nothing_is_begun_anew(world_dir, whole, tmp_path):
    shutil.copytree(whole("coldstart", *LORA), tmp_path / "run")
    for path in (tmp_path / "run/checkpoints").glob("step-*/rank-0.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    log = (tmp_path / "run/metrics.jsonl").read_bytes()
    done = run(*command("coldstart", world_dir, tmp_path / "run", *LORA), check=False)
    assert done.returncode == 1 and "no checkpoint can be used; --resume false" in done.stderr
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == log


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


def test_a_model_that_does_not_fit_on_the_disk_leaves_the_one_before(world_dir, whole, tmp_path):
    shutil.copytree(whole("coldstart", *LORA), tmp_path / "run")
    done = Started(*command("coldstart", world_dir, tmp_path / "run", *LORA), largest_file=20_000).wait()
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"error: {tmp_path / 'run/model'}: could not be written" in done.stderr
    before, after = weights(whole("coldstart", *LORA)), weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_log_that_does_not_fit_on_the_disk_is_named():
    with pytest.raises(DataError, match=r"/dev/full: could not be written.*No space left"):
        append(Path("/dev/full"), [{"step": 1}])


def test_an_unwritable_folder_is_known_at_the_start(world_dir, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(*command("coldstart", world_dir, tmp_path / "file", *LORA), check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: {tmp_path / 'file'}: cannot be a run's folder" in done.stderr


@pytest.mark.parametrize("name", ["file/run", "x" * 256, "of another user"])
def test_what_cannot_be_a_runs_folder_is_not_said_to_be_in_use(name, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    if "user" in name:  # root may write anywhere
        def refuse(path, mode):
            raise PermissionError(13, "Permission denied", str(path))
        monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr("signal.signal", lambda *handler: None)
    with pytest.raises(DataError, match="cannot be a run's folder"):
        Run(RunArgs(out=str(tmp_path / name)), "rl", ALONE)


@pytest.mark.parametrize(("stage", "processes", "extra"), [
    ("rl", 3, LORA), pytest.param("coldstart", 3, LORA, marks=pytest.mark.slow),
    pytest.param("coldstart", 3, FULL, marks=pytest.mark.slow),
    pytest.param("rl", 3, FULL, marks=pytest.mark.slow)])
def test_processes_train_like_one(stage, processes, extra, world_dir, whole, tmp_path):
    """With three, ranks hold unequal numbers of pairs: 4 a step in stage 1."""
    run_ranks(processes, *command(stage, world_dir, tmp_path, *extra))
    assert_close(whole(stage, *extra), tmp_path)


@pytest.mark.parametrize(("stage", "extra"),
                         [("rl", ()), pytest.param("coldstart", (), marks=pytest.mark.slow),
                          pytest.param("rl", ("--train-merger", "true"), marks=pytest.mark.slow)])
def test_sharded_training_is_the_same(stage, extra, world_dir, whole, tmp_path):
    """Three pairs for two ranks: one is idle for a turn in each step of stage 2. The test set is odd too."""
    extra = (*FULL, *extra, "--test", world_dir / "test_id.jsonl")
    run_ranks(2, *command(stage, world_dir, tmp_path, *extra, "--shard", "full"))
    assert_close(whole(stage, *extra), tmp_path)
    before, after = (next(record for record in metrics(out) if "test_id/quality" in record)
                     for out in (whole(stage, *extra), tmp_path))
    assert before == pytest.approx(after, rel=1e-4)


@pytest.mark.slow
def test_a_sharded_run_goes_on_over_any_number_of_ranks(world_dir, whole, tmp_path):
    """Its checkpoints hold whole tensors, and say the same whoever wrote them."""
    sharded = command("coldstart", world_dir, tmp_path / "run", *FULL, "--shard", "full", "--save-every", 1)
    run_ranks(2, *sharded)
    assert len(list(tmp_path.glob("run/checkpoints/step-*/rank-*.safetensors"))) == 2  # of --keep
    newest = tmp_path / "run/checkpoints/step-3/rank-0.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    shutil.copytree(tmp_path / "run", tmp_path / "first")
    for ranks in (2, 3, 1):
        done, *_ = run_ranks(ranks, *sharded)
        assert "step-3: passed over, it is broken (rank-0" in done.stderr
        assert "going on after step 2" in done.stdout
        if ranks == 2:
            assert_same(tmp_path / "first", tmp_path / "run")
        assert_close(whole("coldstart", *FULL), tmp_path / "run")
        newest.write_bytes(newest.read_bytes()[:-100])


@pytest.mark.slow
def test_a_rank_that_dies_is_brought_back(world_dir, whole, tmp_path):
    process = Started(*torchrun(2, "--max-restarts", 1,
                                *command("coldstart", world_dir, tmp_path, *LORA, "--save-every", 1)))
    wait_for(lambda: (tmp_path / "checkpoints/step-1").is_dir(), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    done = process.wait()
    assert done.returncode == 0 and "going on after step" in done.stdout, done.stderr[-3000:]
    assert_close(whole("coldstart", *LORA), tmp_path)


@pytest.mark.slow
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


@pytest.mark.parametrize("stage", ["coldstart", pytest.param("rl", marks=pytest.mark.slow)])
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
    assert done.returncode == 1 and "--lora-rank above 0" in done.stderr


@pytest.mark.slow
def test_evaluation_does_not_depend_on_the_number_of_processes(world_dir, whole, tmp_path):
    pairs = read_pairs(world_dir / "test_id.jsonl")
    assert len({key for pair in pairs for key in pair.videos()}) == 8  # 3 + 3 + 2
    test = ("--test", world_dir / "test_id.jsonl", "--eval-tokens", 120)
    run_ranks(3, *command("coldstart", world_dir, tmp_path, *LORA, *test))
    one, three = (next(record for record in metrics(out) if "test_id/quality" in record)
                  for out in (whole("coldstart", *LORA, *test), tmp_path))
    assert one == pytest.approx(three, rel=1e-4)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints, without a run around them


class Tiny(torch.nn.Linear):
    """What stands for a model: its checkpoints take a millisecond."""

    device = torch.device("cpu")

    def trainable(self):
        return dict(self.named_parameters())


def tiny(folder, keep=3, ranks=ALONE, kind=torch.optim.AdamW):
    torch.manual_seed(0)
    model = Tiny(3, 2)
    optimizer = kind(model.parameters(), lr=0.1)
    checkpoints = Checkpoints(folder, keep, ranks)
    checkpoints.attach(model, optimizer)
    return model, optimizer, checkpoints


def train(model, optimizer, checkpoints, steps):
    """Make some steps and a checkpoint after each; returns the weights after each."""
    found = []
    for step in steps:
        model(torch.ones(1, 3) * step).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        checkpoints.save(step, {"args": {"lr": 0.1}})
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return found


def holds(model, weights):
    return all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.fixture
def trained(tmp_path):
    """A folder with the checkpoints of three steps, and the weights after each."""
    return tmp_path, train(*tiny(tmp_path), (1, 2, 3))


def taken_up(folder, capsys):
    """What a fresh start takes up: the model, state.json, and what was said about it."""
    model, optimizer, checkpoints = tiny(folder)
    state = checkpoints.newest({"lr": 0.1})
    if state:  # it can go on
        train(model, optimizer, SimpleNamespace(save=lambda *_: None), [4])
        model, _, checkpoints = tiny(folder)
        checkpoints.newest({"lr": 0.1})
    return model, state, capsys.readouterr().err


def test_the_last_checkpoints_are_those_of_the_last_steps(tmp_path, capsys):
    """Though step-9 stands behind step-10 in a list of names."""
    weights = train(*tiny(tmp_path, keep=2), (2, 9, 10, 100))
    assert {path.name for path in tmp_path.glob("step-*")} == {"step-10", "step-100"}
    model, state, _ = taken_up(tmp_path, capsys)
    assert state["step"] == 100 and holds(model, weights[-1])


def test_a_checkpoint_is_passed_over_if_any_of_its_bytes_has_changed(trained, capsys):
    folder, weights = trained
    model, state, said = taken_up(folder, capsys)
    assert state["step"] == 3 and holds(model, weights[2]) and not said
    rng = random.Random(0)
    for path in sorted((folder / "step-3").iterdir()):
        content = path.read_bytes()
        for damage in range(100):
            changed = bytearray(content)
            at = rng.randrange(len(content))
            changed[at] ^= 1 << rng.randrange(8)
            if damage % 10 == 0:
                changed = changed[:at]
            path.write_bytes(changed)
            model, state, said = taken_up(folder, capsys)
            assert state["step"] == 2 and holds(model, weights[1]), (path, damage)
            assert f"{folder / 'step-3'}: passed over, it is broken" in said
        path.unlink()
        assert taken_up(folder, capsys)[1]["step"] == 2
        path.write_bytes(content)
    assert taken_up(folder, capsys)[1]["step"] == 3


@pytest.mark.parametrize(("key", "value"), [
    ("step", 99), ("step", "3"), ("step", "missing"), ("args", []), ("args", "missing"), ("ranks", "missing"),
    ("optimizer", []), ("optimizer", None), ("optimizer", {"0/step/x": 1}), ("optimizer", {"9/step": 1}),
    ("optimizer", {"x/step": 1}), ("optimizer", "missing")])
def test_a_state_that_makes_no_sense_is_passed_over_whole(key, value, trained, capsys):
    """Whether or not its sum is right."""
    folder, weights = trained
    path = folder / "step-3/state.json"
    state = json.loads(path.read_text()) | {key: value}
    if value == "missing":
        del state[key]
    sums = (folder / "step-3/SHA256SUMS").read_text().replace(sum_of(path), "")
    path.write_text(json.dumps(state))
    for signed in (False, True):
        if signed:
            (folder / "step-3/SHA256SUMS").write_text(sums + sum_of(path))
        model, found, said = taken_up(folder, capsys)
        assert found["step"] == 2 and holds(model, weights[1]) and "step-3: passed over" in said


def test_shards_that_earlier_code_wrote_are_not_passed_over(trained, capsys):
    folder, _ = trained
    path = folder / "step-3/state.json"
    before = sum_of(path)
    path.write_text(path.read_text().replace('"ranks": null', '"ranks": 2'))
    sums = folder / "step-3/SHA256SUMS"
    sums.write_text(sums.read_text().replace(before, sum_of(path)))
    with pytest.raises(DataError, match=r"each of 2 ranks wrote its shards.*--resume false"):
        taken_up(folder, capsys)


def test_what_is_no_checkpoint_is_let_alone(trained, capsys):
    folder, weights = trained
    for name in ("step-old1", "step-", "step-3.5", "other"):
        (folder / name).mkdir()
    (folder / "step-7").write_text("")
    model, state, said = taken_up(folder, capsys)
    assert state["step"] == 3 and holds(model, weights[2]) and "step-7: passed over" in said


def test_broken_checkpoints_do_not_push_out_whole_ones(trained, capsys):
    folder, _ = trained
    for step in (2, 3):
        (folder / f"step-{step}/SHA256SUMS").unlink()
    model, optimizer, checkpoints = tiny(folder, keep=1)
    assert checkpoints.newest({"lr": 0.1})["step"] == 1
    (folder / "step-1/SHA256SUMS").unlink()
    model, optimizer, checkpoints = tiny(folder, keep=1)
    with pytest.raises(DataError, match="no checkpoint can be used"):
        checkpoints.newest({"lr": 0.1})
    train(model, optimizer, checkpoints, [1])
    assert taken_up(folder, capsys)[1]["step"] == 1


class Threads(Ranks):
    """Two ranks in one process, the lists that they gather side by side."""

    def __init__(self, rank, lists, barrier):
        super().__init__(rank, 2)
        object.__setattr__(self, "meet", (lists, barrier))

    def gather(self, mine):
        lists, barrier = self.meet
        lists[self.rank] = mine
        barrier.wait(20)
        both = lists[0] + lists[1]
        barrier.wait(20)
        return both


def on_two_ranks(folder, work):
    """What `work` returns, or raises, on each of two ranks."""
    lists, barrier = [[], []], threading.Barrier(2)

    def rank(number):
        try:
            return work(number, *tiny(folder, ranks=Threads(number, lists, barrier)))
        except DataError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(rank, range(2)))


def test_ranks_take_up_what_the_first_finds(tmp_path, capsys):
    weights, _ = on_two_ranks(tmp_path, lambda rank, *tiny: train(*tiny, (1, 2, 3)))
    assert len(list(tmp_path.glob("step-3/rank-*.safetensors"))) == 1

    def take_up(rank, model, optimizer, checkpoints, rate=0.1):
        state = checkpoints.newest({"lr": rate if rank == 0 else None})
        return state and state["step"], holds(model, weights[state["step"] - 1])

    assert on_two_ranks(tmp_path, take_up) == [(3, True)] * 2
    for step in (3, 2):
        path = tmp_path / f"step-{step}/rank-0.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        assert on_two_ranks(tmp_path, take_up) == [(step - 1, True)] * 2
        said = capsys.readouterr().err
        assert said.count(f"step-{step}: passed over, it is broken (rank-0.safetensors is not") == 1
    errors = on_two_ranks(tmp_path, partial(take_up, rate=0.2))
    assert all("--lr was 0.1, is 0.2" in str(error) for error in errors)


@pytest.mark.parametrize("name", ["rank-0.safetensors", "state.json"])
def test_a_first_rank_that_cannot_write_ends_them_all(name, tmp_path, monkeypatch):
    def work(rank, model, optimizer, checkpoints):
        train(model, optimizer, checkpoints, [1])
        checkpoints.ranks.meet[1].wait(20)
        monkeypatch.setattr(support.checkpoint, "sum_of", full)
        train(model, optimizer, checkpoints, [2])

    def full(path, sum_of=sum_of):
        if path.name == name:
            raise OSError(28, "No space left on device")
        return sum_of(path)

    for error in on_two_ranks(tmp_path, work):
        assert isinstance(error, DataError) and "step-2: could not be written" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


# ------------------------------------------------------------------------------------------------------------
# What is complete, or absent, at every moment


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.fixture
def killed_at(monkeypatch):
    """Do something, killed before its n-th change of the file system; returns whether it got through."""
    names = ("rename", "replace", "unlink", "rmdir", "fsync")
    plain = {name: getattr(os, name) for name in names} | {"fsync": lambda file: None}

    def do(number, work):
        left = [number]

        def counted(name):
            def change(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return plain[name](*args, **kwargs)
            return change

        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(os, name, counted(name))
            try:
                work()
            except Killed:
                return False
        return True

    return do


def folder_of(path, text):
    (path / "inner").mkdir(parents=True)
    for name in ("one", "inner/two"):
        (path / name).write_text(text)


def content(path):
    return [(path / name).read_text() for name in ("one", "inner/two")] if path.exists() else None


@pytest.mark.parametrize("was_there", [True, False])
def test_whenever_a_replacement_is_killed_a_whole_folder_is_left(was_there, killed_at, tmp_path):
    finished, kills, seen = False, 0, set()
    while not finished:
        twice = 0
        while True:  # clearing up is killed as well, and again
            root = tmp_path / f"{kills}-{twice}"
            place, beside = root / "model", root / "model.partial"
            folder_of(beside, "new")
            if was_there:
                folder_of(place, "old")
                folder_of(root / "model.replaced", "older")  # from a kill before
            finished = killed_at(kills, partial(put_in_place, beside, place))
            cleared = killed_at(twice, partial(settle, place))
            settle(place)
            found = content(place)
            assert found in ([["old"] * 2, ["new"] * 2] if was_there else [None, ["new"] * 2])
            assert not finished or found == ["new"] * 2
            assert [path.name for path in root.iterdir()] == (["model"] if found else [])
            seen.add(str(found))
            twice += 1
            if cleared:
                break
        kills += 1
    assert len(seen) == 2 and kills > (10 if was_there else 5)


def test_whenever_a_removal_is_killed_a_whole_folder_or_none_is_left(killed_at, tmp_path):
    finished, kills = False, 0
    while not finished:
        place = tmp_path / str(kills) / "checkpoints"
        folder_of(place, "old")
        folder_of(place.with_name("checkpoints.removed"), "older")
        finished = killed_at(kills, partial(remove, place))
        assert content(place) in (["old"] * 2, None)
        remove(place)
        settle(place)
        assert list(place.parent.iterdir()) == []
        kills += 1
    assert kills > 5


def test_whenever_an_amendment_is_killed_the_old_or_the_new_is_left(killed_at, tmp_path):
    path, finished, kills = tmp_path / "descore.json", False, 0
    while not finished:
        path.write_text('{"stage": "rl"}')
        finished = killed_at(kills, lambda: amend(path, score_std=2.0))
        assert json.loads(path.read_text()) in ({"stage": "rl"}, {"stage": "rl", "score_std": 2.0})
        kills += 1
    assert json.loads(path.read_text())["score_std"] == 2.0 and list(tmp_path.iterdir()) == [path]


def test_a_log_is_cut_at_a_whole_line_and_never_grows(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    for size, kept, lost in ((0, b"", False), (4, b"1\n2\n", False), (6, b"1\n2\n3\n", False),
                             (3, b"1\n", True), (99, b"1\n2\n3\n", True)):
        path.write_bytes(b"1\n2\n3\n4")
        cut(path, size)
        assert path.read_bytes() == kept and ("lines are lost" in capsys.readouterr().err) == lost
    cut(tmp_path / "new.jsonl", 0)
    assert (tmp_path / "new.jsonl").read_bytes() == b""


def test_the_logs_are_on_the_disk_before_the_checkpoint_that_counts_on_them(tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *handler: None)
    going, done = Run(RunArgs(out=str(tmp_path), train="x"), "rl", ALONE), []
    going.skipped = SimpleNamespace(records=[])
    for path in going.logs:
        path.write_text("{}\n")
    monkeypatch.setattr(support.run, "sync", lambda path: done.append(path.name))
    going.checkpoints = SimpleNamespace(save=lambda step, state: done.append(state["rollouts_bytes"]))
    going.save(50)
    assert done == ["metrics.jsonl", "rollouts.jsonl", "held_out.jsonl", 3]


# ------------------------------------------------------------------------------------------------------------
# A step's bookkeeping


def test_a_total_is_a_mean_over_the_updates_that_had_something():
    means = Means()
    updates = (((1.0, 2.0), (1, 1)), ((0.0, 0.0), (0, 0)), ((5.0, 0.0), (1, 0)))
    for update, (losses, decided) in enumerate(updates):
        for loss, weight in zip(losses, decided):
            means.total(weight, update, bt_loss=loss)
            means.total(0, update, nothing=0.0)
            means.total(1, update, grpo_loss=loss)
    found = means.over(ALONE)
    assert found["bt_loss"] == 4 and found["grpo_loss"] == pytest.approx(8 / 3)
    assert math.isnan(found["nothing"])


def test_ranks_add_up_figures_by_name():
    mine, others = Means(), Means()
    mine.add(a=1.0, b=2.0)
    others.add(b=4.0, c=7.0)
    others.add(a=3.0)
    ranks = SimpleNamespace(gather=lambda one: [
        *one, others.sums if one[0] is mine.sums else others.maxima])
    assert mine.over(ranks) == {"a": 2.0, "b": 3.0, "c": 7.0}


@pytest.mark.parametrize(("items", "updates", "sizes"), [
    (6, 4, [1, 2, 1, 2]), (3, 5, [1, 1, 1]), (8, 4, [2, 2, 2, 2]), (128, 32, [4] * 32), (7, 1, [7])])
def test_a_rollout_batch_is_cut_into_as_many_updates_as_asked(items, updates, sizes):
    found = split_evenly(list(range(items)), updates)
    assert [len(some) for some in found] == sizes and list(chain(*found)) == list(range(items))
