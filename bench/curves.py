"""Draw stage 2's reward and held-out R_q from the metrics.jsonl of one run or several.

    python bench/curves.py runs/seeds/*/rl --out bench/rl.png     # needs matplotlib
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = (("reward", "reward R"), ("reward_quality", "sub-scores matched R_q"),
          ("bt_loss", "auxiliary BT loss"), ("entropy", "entropy a token"))


def read(run: Path) -> list[dict]:
    """A run's log; before it, as step 0, the last evaluation of the stage 1 that it started from."""
    def lines(folder: Path) -> list[dict]:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    before = lines(run.parent / "coldstart") if (run.parent / "coldstart/metrics.jsonl").is_file() else []
    return [record | {"step": 0} for record in before if "test_id/quality" in record][-1:] + lines(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("bench/rl.png"))
    args = parser.parse_args()
    runs = [read(run) for run in args.runs]
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 3), constrained_layout=True)
    for axis, (name, title) in zip(axes, PANELS):
        curves = [[record[name] for record in records if name in record] for records in runs]
        for curve in curves:
            axis.plot(range(1, len(curve) + 1), curve, color="tab:blue", alpha=0.3, linewidth=1)
        mean = np.mean(curves, axis=0)
        axis.plot(range(1, len(mean) + 1), mean, color="tab:blue", linewidth=2)
        if name == "reward_quality":
            for split, colour in (("id", "tab:green"), ("ood", "tab:orange")):
                points = {}
                for records in runs:
                    for record in records:
                        if f"test_{split}/quality" in record:
                            points.setdefault(record["step"], []).append(record[f"test_{split}/quality"])
                axis.plot(list(points), [np.mean(values) for values in points.values()], "o-", color=colour,
                          markersize=4, label=f"held out, {split} ")
            axis.legend(fontsize=7)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
    figure.savefig(args.out, dpi=110)
    print(args.out)


if __name__ == "__main__":
    main()
