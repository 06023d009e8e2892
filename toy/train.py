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
SHOWN = 21  # the pair of test_id whose second video is the clip
MEASURED_BY = "python infer.py --pairs runs/toy/test_id.jsonl --model toy/trained --max-new-tokens 140 --json"
CLAIMED = ("pairs", "accuracy", "accuracy_no_cot", "accuracy_reading", "quality", "format_rate")


def main() -> None:
    demo.main()
    DeScore.load(ROOT / demo.OUT / "rl", device="cpu").save(TOY, note=NOTE)

    # How well it does on the held-out pairs of the generators that it was trained on.
    command = [sys.executable, *MEASURED_BY.split()[1:]]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    found = json.loads(done.stdout)
    claims = {"measured_by": MEASURED_BY} | {name: found[name] for name in CLAIMED}
    claims["interval"] = found["intervals"]["accuracy"]
    pairs = [json.loads(line) for line in (ROOT / "runs/toy/test_id.jsonl").read_text().splitlines()]
    claims["decided"] = sum(pair["preference"] != "tie" for pair in pairs)

    # What it says of a clip.
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
