"""Make the embedded default's data: render the clips, let the backbone annotate them, filter.

    python toy/prepare.py runs/toy

Leaves train_cots.jsonl (the backbone's CoTs, for stage 1) and train_scores.jsonl (reference sub-scores, for
stage 2), both consistent with the label, test_id.jsonl, test_ood.jsonl and test_trap.jsonl.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# The cores that this process may use: a container or a batch system may give it a few of many.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Small steps hardly spread over threads: two processes are faster than one with all of them.
RANKS = 2 if CORES > 1 and not torch.cuda.is_available() else 1


def on_ranks(*words: str | Path) -> list[str | Path]:
    """The words behind `python` that run a script, or "-m" and a module, in `RANKS` processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", RANKS]
    return [*torchrun, *words] if RANKS > 1 else [*words]


def environment() -> dict[str, str]:
    """That of processes which share the cores with those beside them."""
    if RANKS == 1:
        return dict(os.environ)
    return {"OMP_NUM_THREADS": str(CORES // RANKS)} | os.environ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=800)
    parser.add_argument("--test-pairs", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    def run(*command) -> None:
        words = [sys.executable, *map(str, command)]
        subprocess.run(words, cwd=ROOT, env=environment(), check=True)

    out = args.out.resolve()
    annotated = out / "train_annotated.jsonl"
    run("toy/world.py", out, "--pairs", args.pairs, "--test-pairs", args.test_pairs, "--seed", args.seed)
    annotate = on_ranks("-m", "tools.annotate", out / "train.jsonl", annotated)
    run(*annotate, "--model", ROOT / "toy/backbone", "--max-new-tokens", 140, "--think-tokens", 36000,
        "--seed", args.seed)

    def keep_consistent(annotations: Path, kept: str) -> None:
        run("-m", "tools.filter", annotations, out / kept, "--model", ROOT / "toy/backbone")

    with ThreadPoolExecutor() as pool:  # these take one core each
        list(pool.map(keep_consistent, (annotated, out / "train.jsonl"),
                      ("train_cots.jsonl", "train_scores.jsonl")))


if __name__ == "__main__":
    main()
