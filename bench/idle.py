"""How long ranks wait for each other where they judge a file of pairs: simulated, from lengths of CoTs.

    python bench/idle.py                      # lengths as they may be in real use
    python bench/idle.py predictions.jsonl    # and those that infer.py --out has written

26,500 pairs, 53,000 clips with prompts as bench/padding.py draws them, in groups within 65,536 tokens that
count CoTs of 4,096. Each clip's CoT has a length of its own, whatever its prompt. A group takes as many
decode steps as its longest CoT has tokens, and as many more as its prompts have `STEP` tokens. A rank is
idle from the end of its last group, or of each group where all wait for all, until the last rank's end.
"""

import argparse
import heapq
import json
import sys
from pathlib import Path

import numpy as np
from padding import drawn
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from support.batches import deal_to_all, pack_by_budget

PAIRS = 26_500
BUDGET = 65_536
LONGEST = 4_096
STEP = 100  # prompt tokens that are read in the time of a decode step


def in_step(per_rank: list[list[float]]) -> float:
    """The end where all wait for all after each group."""
    turns = max(map(len, per_rank))
    return sum(max(mine[turn] for mine in per_rank if turn < len(mine)) for turn in range(turns))


def alone(per_rank: list[list[float]]) -> float:
    """The end where each has a list of its own and waits for nobody."""
    return max(map(sum, per_rank))


def taken(times: list[float], ranks: int, ahead: int = 0) -> float:
    """The end where whoever is free takes the next group. With `ahead` each takes so many before it
    needs them, for its --workers to decode."""
    queue = iter(times)
    mine = [[next(queue, 0.0) for _ in range(ahead)] for _ in range(ranks)]
    free = [(0.0, rank) for rank in range(ranks)]
    end = 0.0
    while free:
        now, rank = heapq.heappop(free)
        end = max(end, now)
        mine[rank].append(next(queue, 0.0))
        if any(mine[rank]):
            heapq.heappush(free, (now + mine[rank].pop(0), rank))
    return end


def simulate(prompts: list[int], cots: list[int], ranks: int) -> dict[str, float]:
    """The share of the ranks' time that is idle, by the way in which they share the work."""
    sizes = [prompt + LONGEST for prompt in prompts]

    def seconds(group: list[int]) -> float:
        return max(cots[i] for i in group) + sum(prompts[i] for i in group) / STEP

    def by_rank(groups: list[list[int]]) -> list[list[float]]:
        return [[seconds(group) for group in groups[rank::ranks]] for rank in range(ranks)]

    everything = range(len(prompts))
    in_file_order = []
    for rank in range(ranks):
        mine = everything[rank::ranks]
        groups = pack_by_budget(list(mine), [sizes[i] for i in mine], BUDGET)
        in_file_order.append([seconds(group) for group in groups])
    dealt = deal_to_all(list(everything), sizes, BUDGET, ranks)
    of_rank = by_rank(dealt)
    times = [seconds(group) for group in dealt]
    before = sum(map(sum, in_file_order))
    work = sum(times)

    def idle(work: float, end: float) -> float:
        return 1 - work / (ranks * end)

    return {
        "in the file's order, all wait for all after each group": idle(before, in_step(in_file_order)),
        "longest first, all wait for all after each group": idle(work, in_step(of_rank)),
        "longest first, each has its own list": idle(work, alone(of_rank)),
        "longest first, whoever is free takes the next": idle(work, taken(times, ranks)),
        "… and takes it 8 groups ahead, with `--workers 4`": idle(work, taken(times, ranks, 8)),
    }


def lengths_of(path: Path) -> np.ndarray:
    """The tokens of the CoTs in a file of judgements, by the embedded tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy/backbone")
    records = map(json.loads, path.read_text().splitlines())
    return np.array([len(tokenizer.encode(record["cot"])) for record in records if "cot" in record])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("judgements", type=Path, nargs="?", help="what infer.py --out has written")
    parser.add_argument("--ranks", type=int, default=64)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    prompts = [prompt for pair in drawn(PAIRS) for prompt, _ in pair]
    usual = rng.integers(150, 900, len(prompts))
    endless = rng.random(len(prompts)) < 0.01
    lengths = {"150 to 900": usual, "1 in 100 cut off at 4,096": np.where(endless, LONGEST, usual)}
    if args.judgements:
        known = lengths_of(args.judgements)
        low, middle, high = np.quantile(known, [0, 0.5, 1]).round().astype(int)
        name = f"{len(known)} measured, {low} to {high}, median {middle}"
        lengths[name] = rng.choice(known, len(prompts))
    print(f"| {PAIRS:,} pairs on {args.ranks} ranks; CoTs of so many tokens: | {' | '.join(lengths)} |")
    print("| --- |" + " ---: |" * len(lengths))
    columns = [simulate(prompts, cots.tolist(), args.ranks) for cots in lengths.values()]
    for way in columns[0]:
        print(f"| {way} | " + " | ".join(f"{column[way]:.1%}" for column in columns) + " |")


if __name__ == "__main__":
    main()
