"""Kill a run at random moments, let it go on, compare it bit for bit with one that was never killed.

    python bench/kill.py --stage rl --kills 20

Kills come after a random time, so they fall into rollouts, updates, evaluations and saving alike. Compared
are all weights and the log.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent


def command(stage: str, data: Path, out: Path) -> list[str]:
    shared = ["--model", "toy/backbone", "--out", out, "--test", data / "test_id.jsonl", "--save-every", 1,
              "--lora-rank", 8, "--min-pixels", 4096, "--max-pixels", 4096, "--max-new-tokens", 40,
              "--lr", 1e-3, "--workers", 1]
    own = {"coldstart": ["--train", data / "cots.jsonl", "--epochs", 2, "--batch-size", 4],
           "rl": ["--train", data / "train.jsonl", "--steps", 8, "--batch-size", 2, "--group-size", 4]}[stage]
    return [sys.executable, *map(str, [f"{stage}.py", *shared, *own])]


def outcome(out: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """A run's log without the times, and its weights."""
    log = [{key: value for key, value in json.loads(line).items() if not key.startswith("seconds")}
           for line in (out / "metrics.jsonl").read_text().splitlines()]
    return log, {name: tensor for path in (out / "model").glob("*.safetensors")
                 for name, tensor in load_file(path).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", choices=("coldstart", "rl"), default="rl")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        subprocess.run([sys.executable, "toy/world.py", data, "--pairs", "16", "--test-pairs", "2"], cwd=ROOT,
                       check=True)
        cot = "<think>seen</think><answer>{}</answer>"
        (data / "cots.jsonl").write_text("".join(
            json.dumps(json.loads(line) | {"cot_a": cot, "cot_b": cot}) + "\n"
            for line in (data / "train.jsonl").read_text().splitlines()))
        started = time.time()
        subprocess.run(command(args.stage, data, data / "whole"), cwd=ROOT, check=True, capture_output=True)
        seconds = time.time() - started
        print(f"{args.stage}: a run takes {seconds:.0f} s", flush=True)
        kills = starts = 0
        while kills < args.kills:
            starts += 1
            process = subprocess.Popen(command(args.stage, data, data / "killed"), cwd=ROOT,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                process.wait(rng.uniform(0, seconds))
                assert process.returncode == 0, "it failed by itself"
                (data / "killed").rename(data / f"done-{starts}")  # it got through: begin another
                compare(data / "whole", data / f"done-{starts}")
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                found = sorted(path.name for path in (data / "killed/checkpoints").glob("*"))
                print(f"kill {kills:2d}: {', '.join(found) or 'no checkpoint yet'}", flush=True)
        subprocess.run(command(args.stage, data, data / "killed"), cwd=ROOT, check=True, capture_output=True)
        compare(data / "whole", data / "killed")
        print(f"{args.stage}: after {kills} kills the log and every weight are equal, bit for bit")


def compare(one: Path, other: Path) -> None:
    (log, weights), (other_log, other_weights) = outcome(one), outcome(other)
    assert log == other_log, "the logs differ"
    assert weights.keys() == other_weights.keys(), "the weights have other names"
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights), "the weights differ"


if __name__ == "__main__":
    main()
