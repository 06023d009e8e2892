"""What each stage does to the embedded default, over several seeds, and what the auxiliary loss is for.

    python bench/seeds.py               # three seeds, a run of each stage and one with λ = 0

Prints the README's table: held-out figures of the backbone, after stage 1, after stage 2, and after stage 2
without the auxiliary Bradley-Terry loss, means over the seeds (standard deviation). The held-out pairs are
drawn with another seed than those of runs/toy, by which the presets were chosen. Runs that are there already
are not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "toy"))
from demo import COLUMNS, figures

HELD_OUT = "runs/held_out"
TEST = ("--test", f"{HELD_OUT}/test_id.jsonl", f"{HELD_OUT}/test_ood.jsonl")


def run(script: str, out: str, *arguments: str) -> None:
    """Run a stage unless its folder already holds what it ended with."""
    info = ROOT / out / "model/descore.json"
    if not info.is_file() or "score_std" not in json.loads(info.read_text()):  # not yet measured
        print(f"$ python {script} --out {out} {' '.join(arguments)}", flush=True)
        subprocess.run([sys.executable, script, "--out", out, *TEST, *arguments], cwd=ROOT, check=True,
                       stdout=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    if not (ROOT / HELD_OUT / "test_ood.jsonl").is_file():
        subprocess.run([sys.executable, "toy/world.py", HELD_OUT, "--pairs", "0", "--test-pairs", "400",
                        "--seed", "1"], cwd=ROOT, check=True, stdout=sys.stderr)
    found: dict[str, list[dict]] = {"backbone": [], "coldstart": [], "rl": [], "rl, λ = 0": []}
    for seed in map(str, range(args.seeds)):
        one, two, without = (f"runs/seeds/{seed}/{name}" for name in ("coldstart", "rl", "rl_no_bt"))
        before = () if seed == "0" else ("--eval-before", "false")  # the backbone is the same for all
        run("coldstart.py", one, "--seed", seed, *before)
        run("rl.py", two, "--seed", seed, "--model", one)
        run("rl.py", without, "--seed", seed, "--model", one, "--bt-weight", "0")
        if seed == "0":
            found["backbone"] = [{key: value for key, value in figures(one, 0).items()
                                  if not key.startswith("accuracy")}]
        for stage, folder in (("coldstart", one), ("rl", two), ("rl, λ = 0", without)):
            found[stage].append(figures(folder, -1))
    print("| | " + " | ".join(COLUMNS) + " |\n| --- |" + " ---: |" * len(COLUMNS))
    for stage, records in found.items():
        cells = []
        for name in COLUMNS:
            values = [record[name] for record in records if name in record]
            spread = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}" if values else "–")
        print(f"| {stage} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
