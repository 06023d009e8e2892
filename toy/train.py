"""Train the embedded model, toy/trained: run the demo, keep what its stage 2 made, and measure that.

    python toy/train.py       # some ten minutes on two cores

Leaves the adapter, [Reward] and the head, which stand on toy/backbone, the clip that the README shows, and
claims.json: how well the model does on the demo's held-out pairs, and what it says of the clip.
tests/test_trained.py holds it to that.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import demo  # puts the project on the path

from infer import judge
from model import DeScore
from support.files import TOY
from support.tables import describe

ROOT = Path(__file__).resolve().parent.parent
NOTE = "the toy judges: a tiny embedded model that knows the toy's world alone"
HELD_OUT = 120  # pairs of test_id on which it is measured: new clips of the generators that it knows
SHOWN = 21  # the pair whose second video is the clip
MEASURED_BY = "python infer.py --pairs runs/toy/held.jsonl --model toy/trained --max-new-tokens 140 --json"
CLAIMED = ("pairs", "accuracy", "accuracy_no_cot", "accuracy_reading", "quality", "format_rate")


def main() -> None:
    demo.main()
    keep(DeScore.load(ROOT / demo.OUT / "rl", device="cpu"))


def keep(model: DeScore) -> None:
    """Make a model of the demo's runs the embedded one."""
    model.save(TOY, note=NOTE)
    lines = (ROOT / "runs/toy/test_id.jsonl").read_text().splitlines(keepends=True)[:HELD_OUT]
    (ROOT / "runs/toy/held.jsonl").write_text("".join(lines))
    command = [sys.executable, *MEASURED_BY.split()[1:]]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    found = json.loads(done.stdout)
    # Its scale is that of these scores.
    model.info.pop("score_quantiles", None)
    model.save(TOY, score_mean=found["score_mean"], score_std=found["score_std"])

    pairs = [json.loads(line) for line in lines]
    claims = {"measured_by": MEASURED_BY} | {name: found[name] for name in CLAIMED}
    claims["interval"] = found["intervals"]["accuracy"]
    claims["decided"] = sum(pair["preference"] != "tie" for pair in pairs)
    shown = pairs[SHOWN]
    shutil.copy(ROOT / "runs/toy" / shown["video_b"], ROOT / "toy/clip.mp4")
    model = DeScore.load(TOY, device="cpu")
    (record,) = judge(model, [(str(ROOT / "toy/clip.mp4"), shown["prompt"])])
    said = describe(model, record)
    claims["clip"] = {name: said[name] for name in ("prompt", "cot", "score", "standardised")}
    (TOY / "claims.json").write_text(json.dumps(claims, indent=1) + "\n")
    print(f"{TOY}: {json.dumps(claims, indent=1)}")


if __name__ == "__main__":
    main()
