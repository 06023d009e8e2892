"""What can be reached on the embedded world: how often judges that see no video agree with the annotator.

    python experiments/ceilings.py        # 20,000 pairs of each set, half a minute

The truth is the clips' quality; the sub-scores are the true ones, their weighted mean; the signature says
what it seems to say in training. A rule that does not decide a pair is right half the time. Beside them, how
often a second annotator agrees with the first where both decide.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
import world


def ceilings(split: str, count: int, seed: int) -> dict[str, list[float]]:
    """For each rule, whether it is right on each decided pair of a split."""
    found: dict[str, list[float]] = {"two annotators": [], "decided": []}
    for index in range(count):
        rng = np.random.default_rng((seed, world.SPLITS.index(split), index))
        pair, _ = world.draw_pair(split, rng)
        decided = pair["preference"] != "tie"
        found["decided"].append(decided)
        if not decided:
            continue
        rules = world.rules(pair)
        for name, margin in rules.items():
            found.setdefault(name, []).append(world.right(margin, pair["preference"]))
        second = world.prefer(rules["truth"], rng)
        if second != "tie":
            found["two annotators"].append(second == pair["preference"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    names = ("truth", "sub-scores", "signature", "two annotators", "decided")
    print("| | " + " | ".join(names) + " |\n| --- |" + " ---: |" * len(names))
    for split in world.SPLITS:
        found = ceilings(split, args.pairs, args.seed)
        cells = []
        for name in names:
            half = 1.96 * np.std(found[name]) / len(found[name]) ** 0.5
            cells.append(f"{np.mean(found[name]):.3f} ± {half:.3f}")
        print(f"| {split} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
