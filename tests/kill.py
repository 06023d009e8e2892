"""Kill runs, let them go on, compare them bit for bit with one that was never killed.

    python tests/kill.py --stage rl                # at 20 random moments
    python tests/kill.py --stage rl --ranks 2      # one of two processes, at random moments
    python tests/kill.py --stage rl --calls        # before every call that changes a file of the run
    python tests/kill.py --stage rl --calls --over # the same, of a run that replaces a finished one

Compared are all weights and the log.
"""

import argparse
import itertools
import json
import os
import random
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import launch

# What Python says before it changes a file (PEP 578); "open" only where it is to write.
CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}


def command(stage: str, data: Path, out: Path) -> list:
    """A small run that saves a checkpoint every step."""
    shared = ["--model", "toy/backbone", "--out", out, "--test", data / "test_id.jsonl",
              "--save-every", 1, "--lora-rank", 8, "--min-pixels", 4096, "--max-pixels", 4096,
              "--max-new-tokens", 40, "--lr", 1e-3, "--workers", 0]
    own = {"coldstart": ["--train", data / "cots.jsonl", "--epochs", 1, "--batch-size", 4],
           "rl": ["--train", data / "train.jsonl", "--steps", 4, "--batch-size", 2, "--updates", 2,
                  "--group-size", 4]}
    return [f"{stage}.py", *shared, *own[stage]]


def make_data(data: Path) -> None:
    """Sixteen pairs of the toy world, with CoTs for stage 1."""
    launch.run("toy/world.py", data, "--pairs", 16, "--test-pairs", 2)
    cot = "<think>seen</think><answer>{}</answer>"
    with (data / "cots.jsonl").open("w") as file:
        for line in (data / "train.jsonl").read_text().splitlines():
            file.write(json.dumps(json.loads(line) | {"cot_a": cot, "cot_b": cot}) + "\n")


def start(ranks: int, words: list) -> list[launch.Started]:
    """Start a stage in so many processes."""
    if ranks == 1:
        return [launch.Started(*words)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ids = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return [launch.Started(*words, env=env | own) for own in ids]


def ended(started: list[launch.Started]) -> None:
    """Wait for processes to end well."""
    for process in started:
        done = process.wait()
        assert done.returncode == 0, done.stderr[-2000:]


def until_killed_before(call: int, out: str, words: list[str]) -> None:
    """Run a stage in this process, which dies before its call number so much that would change
    something in the folder."""
    count = itertools.count()

    def watch(event, arguments):
        if event not in CHANGES or not str(arguments[0]).startswith(out):
            return
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        if (event != "open" or arguments[2] & writes) and next(count) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def outcome(out: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """A run's log without the times, and its weights."""
    log, weights = [], {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        log.append({key: record[key] for key in record if not key.startswith("seconds")})
    for path in (out / "model").glob("*.safetensors"):
        weights |= load_file(path)
    return log, weights


def compare(one: Path, other: Path) -> None:
    (log, weights), (other_log, other_weights) = outcome(one), outcome(other)
    assert log == other_log, "the logs differ"
    assert weights.keys() == other_weights.keys(), "the weights have other names"
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights), "weights differ"


def left(out: Path) -> str:
    """What a killed run has on the disk."""
    return ", ".join(sorted(path.name for path in out.glob("*"))) or "nothing"


def at_random_moments(args: argparse.Namespace, data: Path, seconds: float) -> int:
    """Kill one of the processes after a random time, start again, until there were enough kills."""
    rng, kills, out = random.Random(args.seed), 0, data / "killed"
    while kills < args.kills:
        started, end = start(args.ranks, command(args.stage, data, out)), time.time()
        end += rng.uniform(0, seconds)
        while time.time() < end and all(process.running() for process in started):
            time.sleep(0.01)
        if all(process.running() for process in started):
            kills += 1
            rng.choice(started).kill()
            print(f"kill {kills:2d}: {left(out)}", flush=True)
            for process in started:  # torchrun ends the others
                process.kill()
                process.process.join()
        else:  # it got through: begin another
            ended(started)
            compare(data / "whole", out)
            shutil.rmtree(out)
    ended(start(args.ranks, command(args.stage, data, out)))
    compare(data / "whole", out)
    return kills


def at_every_call(args: argparse.Namespace, data: Path) -> int:
    """Kill a run before each call that changes a file, and let each go on to its end."""
    out = data / "killed"
    words = command(args.stage, data, out) + ["--resume", "false"] * args.over
    for call in itertools.count():
        shutil.rmtree(out, ignore_errors=True)
        if args.over:
            shutil.copytree(data / "whole", out)
        done = launch.Started("tests/kill.py", "--child", call, out, *words).wait()
        if done.returncode == 0:
            return call
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        print(f"call {call:3d}: {left(out)}", flush=True)
        ended(start(1, words))
        compare(data / "whole", out)
        found = [path.name for path in out.rglob("*") if path.suffix in (".partial", ".removed")]
        assert not found, f"{found} is left"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", choices=("coldstart", "rl"), default="rl")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--calls", action="store_true")
    parser.add_argument("--over", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        make_data(data)
        started = time.time()
        ended(start(args.ranks, command(args.stage, data, data / "whole")))
        seconds = time.time() - started
        print(f"{args.stage}: a run takes {seconds:.0f} s", flush=True)
        kills = at_every_call(args, data) if args.calls else at_random_moments(args, data, seconds)
    print(f"{args.stage}, {args.ranks} processes: after {kills} kills the log and every weight are "
          "equal, bit for bit")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        until_killed_before(int(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main()
