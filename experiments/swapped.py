"""Does the embedded backbone look? How often its sub-scores are right, and with the videos of other pairs.

    python experiments/swapped.py --pairs 100

The prompt and the reference sub-scores stay, the video is that of another pair: a model that goes by the
prompt alone would be right as often as before.
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import Pair, keys_of, read_pairs
from infer import by_key, judge, measure
from model import DeScore
from support.command import run_command


def with_other_videos(pairs: list[Pair]) -> list[Pair]:
    """Each pair's prompt and reference sub-scores with the videos of the pair before it."""
    return [replace(pair, video_a=other.video_a, video_b=other.video_b)
            for pair, other in zip(pairs, pairs[-1:] + pairs)]


def figures(model: DeScore, pairs: list[Pair]) -> dict[str, float]:
    """`infer.measure` on CoTs sampled at temperature 1."""
    judged = by_key(judge(model, keys_of(pairs), max_new_tokens=160, temperature=1.0))
    return measure(pairs, judged, model.processor.dimensions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=100, help="in domain and out of domain each")
    args = parser.parse_args()
    model = DeScore.load(ROOT / "toy/backbone")
    model.has_head = True  # a fresh one, whose scores are not looked at
    print("| pairs | R_q | format | R_q, swapped | format, swapped |\n| --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, ROOT / "toy/world.py", folder, "--pairs", "0", "--test-pairs",
                        str(args.pairs), "--seed", "1"], check=True, stdout=subprocess.DEVNULL)
        for split in ("test_id", "test_ood"):
            pairs = read_pairs(Path(folder) / f"{split}.jsonl")
            own, swapped = (figures(model, shown) for shown in (pairs, with_other_videos(pairs)))
            print(f"| {split} | {own['quality']:.3f} | {own['format_rate']:.3f} | {swapped['quality']:.3f} "
                  f"| {swapped['format_rate']:.3f} |", flush=True)


if __name__ == "__main__":
    run_command(main)
