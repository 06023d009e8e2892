"""One server with two threads against two servers with one thread each, behind one `tools.client.Client`.

    python bench/servers.py runs/toy/test_id.jsonl                       # the embedded scorer
    python bench/servers.py PAIRS --model runs/demo/rl --repeats 5

Callers in many threads ask about one clip at a time; every answer has to be that clip's own: the CoT and,
within 1e-3, the score that `infer.judge` gives it. The two ways take turns, and no server keeps an answer.
At the end one of the two servers is killed while it works.
"""

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import keys_of, read_pairs
from infer import by_key, judge
from model import DeScore
from support.command import run_command
from tools.client import Client

NEAR = 1e-3  # scores of a clip in different company differ by rounding alone


class Served:
    """A server process on a port of its own."""

    def __init__(self, model: str, threads: int):
        command = [sys.executable, "-m", "tools.serve", "--model", model, "--port", "0", "--kept", "0",
                   "--accept-any"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        self.url = re.search(r"http://\S+", self.process.stdout.readline())[0]


def ask_all(client: Client, expected: dict, callers: int, during: Callable[[int], None]) -> float:
    """Ask about every clip; the seconds that it took. `during` is told of each answer. Raises
    AssertionError for one that is not its clip's."""
    count = 0

    def ask(key: tuple[str, str]) -> None:
        nonlocal count
        video, prompt = key
        (record,) = client(video, prompt)
        own = expected[key]
        assert record["error"] is None, f"{video}: {record['error']}"
        assert record["cot"] == own["cot"], f"{video}: another's CoT"
        assert abs(record["score"] - own["score"]) < NEAR, f"{video}: another's score"
        count += 1
        during(count)

    started = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(ask, expected))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pairs", help="a pair file, of which each clip is asked about")
    parser.add_argument("--model", default=str(ROOT / "toy/trained"))
    parser.add_argument("--callers", type=int, default=32, help="threads")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    keys = list(dict.fromkeys(keys_of(read_pairs(args.pairs))))
    expected = by_key(judge(DeScore.load(args.model, device="cpu"), keys, max_new_tokens=2048))
    apart = len({(record["cot"], record["score"]) for record in expected.values()})
    print(f"{len(expected)} clips, {apart} different answers, {args.callers} callers")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through `finally`
    servers = []
    try:
        for threads in (2, 1, 1):
            servers.append(Served(args.model, threads))
        one, *two = (server.url for server in servers)
        ways = {"one server, two threads": Client(one), "two servers, one thread each": Client(two)}
        seconds = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name, client in ways.items():
                seconds[name].append(ask_all(client, expected, args.callers, lambda count: None))
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        slowest = max(medians.values())
        print("\n| way | seconds | clips a second | ratio |\n| --- | --- | ---: | ---: |")
        for name, median in medians.items():
            times = ", ".join(f"{time:.1f}" for time in seconds[name])
            print(f"| {name} | {times} | {len(expected) / median:.1f} | {slowest / median:.2f} × |")

        def kill(count: int) -> None:
            if count == len(expected) // 3:
                servers[-1].process.kill()

        took = ask_all(Client(two), expected, args.callers, kill)
        print(f"\none of two killed after {len(expected) // 3} answers: all {len(expected)} came and were "
              f"their clips' own, in {took:.1f} s")
    finally:
        for server in servers:
            server.process.kill()
            server.process.wait()


if __name__ == "__main__":
    run_command(main)
