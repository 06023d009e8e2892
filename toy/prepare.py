"""Make the embedded default's data: render the clips, let the backbone annotate them, filter.

    python toy/prepare.py runs/toy

Leaves train_cots.jsonl (the backbone's CoTs, for stage 1) and train_scores.jsonl (reference sub-scores, for
stage 2), both consistent with the label, test_id.jsonl, test_ood.jsonl and test_trap.jsonl.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=800)
    parser.add_argument("--test-pairs", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    def run(*command) -> None:
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)

    out = args.out.resolve()
    annotated = out / "train_annotated.jsonl"
    run("toy/world.py", out, "--pairs", args.pairs, "--test-pairs", args.test_pairs, "--seed", args.seed)
    run("-m", "tools.annotate", out / "train.jsonl", annotated, "--model", ROOT / "toy/backbone",
        "--max-new-tokens", 140, "--think-tokens", 36000, "--seed", args.seed)
    for annotations, kept in ((annotated, "train_cots.jsonl"), (out / "train.jsonl", "train_scores.jsonl")):
        run("-m", "tools.filter", annotations, out / kept, "--model", ROOT / "toy/backbone")


if __name__ == "__main__":
    main()
