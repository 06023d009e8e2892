"""What the embedded backbone's frozen vision tower shows of each degree of the world, and how true
its CoTs are.

    python experiments/sight.py        # 1,200 clips, half a minute; the CoTs are those that `make demo` left

A ridge regression from the tower's features (means, maxima and spreads over places and moments) to each
degree, learnt on 900 clips: R² on the other 300, with the bootstrap's 95 % interval. And of the CoTs that it
wrote about the demo's training videos, the share of sub-scores that are the true ones.
"""

import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
import pretrain
import world

from data import parse_cot, per_video
from model import DeScore
from support.command import run_command
from support.formats import read_pairs
from support.tables import bootstrap

COTS = ROOT / "runs/toy/train_annotated.jsonl"
LEARN, TEST, RIDGE = 900, 300, 300.0


@torch.no_grad()
def features(model: DeScore, clips: list[world.Clip], seed: int) -> torch.Tensor:
    """(N, F) of N clips, rendered anew, as read from a file without loss."""
    samples = []
    for number, clip in enumerate(clips):
        frames = world.render(clip, np.random.default_rng((seed, number)), pretrain.SAMPLED)
        frames = torch.from_numpy(frames).permute(0, 3, 1, 2)
        samples.append(model.processor.sample(frames, (pretrain.SAMPLED / world.FPS).tolist(), ""))
    pooled, deepstack = model.encode(model.processor.collate(samples)).features
    moments = len(pretrain.SAMPLED) // 2  # two frames make a temporal patch
    parts = [part.view(len(clips), moments, -1, part.shape[-1]) for part in (pooled, *deepstack)]
    seen = torch.cat(parts, -1).double()
    return torch.cat([seen.mean((1, 2)), seen.amax((1, 2)), seen.mean(2).std(1), seen.std((1, 2))], 1)


def true_sub_scores(path: Path) -> None:
    """Print, by dimension, how many of the CoTs in a pair file give the reference's sub-score."""
    pairs = read_pairs(path, dimensions=world.DIMENSIONS)
    right = []
    for cot, gold in zip(per_video(pairs, "cot"), per_video(pairs, "scores")):
        read = parse_cot(cot, world.DIMENSIONS)
        said = read["dimensional_scores"] if read else {}
        right.append([said.get(name) == gold[name] for name in world.DIMENSIONS])
    print(f"\n| sub-scores of {len(right)} CoTs | true |\n| --- | ---: |")
    for name, share in zip(world.DIMENSIONS, np.mean(right, 0)):
        print(f"| {name} | {share:.2f} |")
    print(f"| all | {np.mean(right):.2f} |")


def main() -> None:
    model, rng = DeScore.load(ROOT / "toy/backbone", device="cpu"), np.random.default_rng(5)
    clips = [pretrain.draw_clip(world.draw_request(rng, novel=False), rng) for _ in range(LEARN + TEST)]
    x = torch.cat([features(model, clips[i : i + 60], i) for i in range(0, len(clips), 60)])
    x = (x - x[:LEARN].mean(0)) / (x[:LEARN].std(0) + 1e-6)
    y = torch.tensor([[getattr(clip, name) for name in pretrain.DEGREES] for clip in clips]).double()
    known, mean = x[:LEARN], y[:LEARN].mean(0)
    squares = known.T @ known + RIDGE * torch.eye(x.shape[1])
    weights = torch.linalg.solve(squares, known.T @ (y[:LEARN] - mean))
    off = (x[LEARN:] @ weights + mean - y[LEARN:]) ** 2
    from_mean = (y[LEARN:] - y[LEARN:].mean(0)) ** 2
    print("| degree | R² | 95 % |\n| --- | ---: | ---: |")
    for i, name in enumerate(pretrain.DEGREES):

        def r2(rows, i=i) -> float:
            return 1 - (off[rows, i].sum() / from_mean[rows, i].sum()).item()

        low, high = bootstrap(r2, TEST, draws=2000)
        print(f"| {name} | {r2(torch.arange(TEST)):.2f} | {low:.2f} to {high:.2f} |")
    if COTS.is_file():
        true_sub_scores(COTS)


if __name__ == "__main__":
    run_command(main)
