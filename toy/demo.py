"""The whole method on the embedded default, from rendered clips to a table of what each stage did.

    python toy/demo.py        # or `make demo`, which sets up first

Runs the commands a user would run, in folders of its own, reads the figures from the runs' metrics.jsonl and
writes runs/demo/figures.json. Killed and started again it goes on; a stage that cannot, because something it
depends on has changed, says so and is run anew.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
import world
from prepare import environment, on_ranks
from world import right

OUT = "runs/demo"
TESTS = ("test_id", "test_ood", "test_trap")
# What stands in a row of the table, and the figure that says it.
FIGURES = {"score": "accuracy", "score without CoT": "accuracy_no_cot", "reading the CoT": "accuracy_reading",
           "R_q": "quality", "format": "format_rate"}


def run(*command: str | Path, env: dict[str, str] | None = None) -> float:
    """Run one of the project's scripts, showing the command and what it says. Returns the seconds it took.
    Raises CalledProcessError, with the end of what it said, where it fails."""
    shown = " ".join(f'"{word}"' if " " in str(word) else str(word) for word in command)
    print(f"\n$ python {shown}", flush=True)
    started, said = time.time(), b""
    words = [sys.executable, *map(str, command)]
    process = subprocess.Popen(words, cwd=ROOT, env=env, stderr=subprocess.PIPE)
    while part := process.stderr.read1():
        sys.stderr.buffer.write(part)
        sys.stderr.flush()
        said = (said + part)[-20_000:]  # torchrun speaks last
    if code := process.wait():
        raise subprocess.CalledProcessError(code, shown, stderr=said.decode(errors="replace"))
    return time.time() - started


def run_stage(*command: str | Path) -> float:
    """`run` a stage on all ranks; where it has not gone on with what is no longer the same, begin it anew."""
    command = on_ranks(*command)
    try:
        return run(*command, env=environment())
    except subprocess.CalledProcessError as error:
        if "--resume false" not in error.stderr:
            raise
    return run(*command, "--resume", "false", env=environment())


def figures(run_folder: str) -> dict[str, dict[str, float]]:
    """The last evaluation of a run: for each row of the table a figure by test set."""
    lines = (ROOT / run_folder / "metrics.jsonl").read_text().splitlines()
    record = [record for record in map(json.loads, lines) if "test_id/quality" in record][-1]
    return {row: {test: record[f"{test}/{name}"] for test in TESTS} for row, name in FIGURES.items()}


def rules(folder: Path) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """How often rules that see no video agree with the labels, and how many pairs of a test set are
    decided."""
    found, decided = {}, {}
    for test in TESTS:
        pairs = [json.loads(line) for line in (folder / f"{test}.jsonl").read_text().splitlines()]
        pairs = [pair for pair in pairs if pair["preference"] != "tie"]
        decided[test] = len(pairs)
        for name in world.rules(pairs[0]):
            agreed = fmean(right(world.rules(pair)[name], pair["preference"]) for pair in pairs)
            found.setdefault(name, {})[test] = agreed
    return found, decided


def show(stage: str, rows: dict[str, dict[str, float]], decided: dict[str, int]) -> None:
    """Rows of the table, accuracies with 95 % intervals."""
    for row, found in rows.items():
        cells = []
        for test, value in found.items():
            half = 1.96 * (value * (1 - value) / decided[test]) ** 0.5
            cells.append(f"{value:.3f}" if row in ("R_q", "format") else f"{value:.3f} ± {half:.3f}")
        print(f"{stage:<10}{row:<20}" + "".join(f"{cell:>16}" for cell in cells))
        stage = ""


def main() -> None:
    seconds = {}
    if not (ROOT / "runs/toy/train_cots.jsonl").is_file():
        seconds["data"] = run("toy/prepare.py", "runs/toy")
    seconds["coldstart"] = run_stage("coldstart.py", "--out", f"{OUT}/coldstart")
    seconds["rl"] = run_stage("rl.py", "--model", f"{OUT}/coldstart", "--out", f"{OUT}/rl")
    pair = json.loads((ROOT / "runs/toy/test_id.jsonl").read_text().splitlines()[0])
    clip = f"runs/toy/{pair['video_a']}"
    seconds["infer"] = run("infer.py", "--model", f"{OUT}/rl", clip, pair["prompt"])
    truth, decided = rules(ROOT / "runs/toy")
    stages = {"rules": truth, "stage 1": figures(f"{OUT}/coldstart"), "stage 2": figures(f"{OUT}/rl")}
    record = stages | {"decided": decided, "seconds": seconds}
    (ROOT / OUT / "figures.json").write_text(json.dumps(record, indent=1) + "\n")
    counts = ", ".join(f"{n} pairs ({test})" for test, n in decided.items())
    print(f"\nAgreement with the labels, of {counts}")
    print(f"\n{'':<30}" + "".join(f"{test:>16}" for test in TESTS))
    for stage, rows in stages.items():
        show(stage, rows, decided)
    print("\ntest_id: the generators of the training pairs; test_ood: new ones, whose looks say nothing,\n"
          "and new combinations; test_trap: new ones, whose looks say the opposite of what they did")
    times = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    print(f"seconds: {times}; figures in {OUT}/figures.json")


if __name__ == "__main__":
    main()
