"""The whole method on the embedded default, from rendered clips to a table of what each stage did.

    python toy/demo.py        # or `make demo`, which sets up first

Runs the commands a user would run, reads the figures from the runs' metrics.jsonl and writes runs/demo.json.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("accuracy_id", "accuracy_ood", "accuracy_id_no_cot", "accuracy_ood_no_cot", "quality_id",
           "quality_ood", "format_rate")


def run(*command: str | Path) -> float:
    """Run one of the project's scripts, showing the command. Returns the seconds it took."""
    shown = " ".join(f'"{word}"' if " " in str(word) else str(word) for word in command)
    print(f"\n$ python {shown}", flush=True)
    started = time.time()
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
    return time.time() - started


def figures(run_folder: str, which: int) -> dict[str, float]:
    """One evaluation of a run: the first (0) or the last (-1), under the demo's names."""
    lines = (ROOT / run_folder / "metrics.jsonl").read_text().splitlines()
    record = [record for record in map(json.loads, lines) if "test_id/quality" in record][which]
    found = {f"{name}_{split}{suffix}": record[f"test_{split}/{name}{suffix}"]
             for name, suffix in (("accuracy", ""), ("accuracy", "_no_cot"), ("quality", ""))
             for split in ("id", "ood")}
    return found | {"format_rate": (record["test_id/format_rate"] + record["test_ood/format_rate"]) / 2}


def main() -> None:
    seconds = {}
    if not (ROOT / "runs/toy/train_cots.jsonl").is_file():
        seconds["data"] = run("toy/prepare.py", "runs/toy")
    seconds["coldstart"] = run("coldstart.py")
    seconds["rl"] = run("rl.py")
    seconds["infer"] = 0.0
    for split in ("test_id", "test_ood"):  # a clip of each kind
        pair = json.loads((ROOT / f"runs/toy/{split}.jsonl").read_text().splitlines()[0])
        seconds["infer"] += run("infer.py", f"runs/toy/{pair['video_a']}", pair["prompt"])
    # A backbone has no scores yet: its query and head are fresh.
    backbone = {key: value for key, value in figures("runs/coldstart", 0).items()
                if not key.startswith("accuracy")}
    stages = {"backbone": backbone, "coldstart": figures("runs/coldstart", -1), "rl": figures("runs/rl", -1)}
    (ROOT / "runs/demo.json").write_text(json.dumps(stages | {"seconds": seconds}, indent=1) + "\n")
    print(f"\n{'':<10}" + "".join(f"{name.replace('accuracy', 'acc'):>15}" for name in COLUMNS))
    for stage, found in stages.items():
        cells = (f"{found[name]:>15.3f}" if name in found else f"{'–':>15}" for name in COLUMNS)
        print(f"{stage:<10}" + "".join(cells))
    print("\nid: the generators of the training pairs; ood: new ones, whose looks go with the opposite of it")
    times = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    print(f"seconds: {times}; figures in runs/demo.json")


if __name__ == "__main__":
    main()
