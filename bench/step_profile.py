"""Where the time of a stage-2 step goes: decode, tower, prefill, decode steps, reference, update, optimiser.

    python bench/step_profile.py                                  # the embedded default: 8 pairs, groups of 8
    python bench/step_profile.py --model runs/8b-coldstart --train train.jsonl --pairs 1 --max-new-tokens 512

Each part is timed by itself, the device waited for before and after, so that the parts add up to the step.
"""

import argparse
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from coldstart import bt_loss
from data import read_pairs
from model import DeScore
from rl import group_advantages, grpo_loss
from support.batches import read_ahead
from support.command import run_command

SPENT: dict[str, float] = defaultdict(float)


@contextmanager
def timed(part: str):
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    started = now()
    yield
    SPENT[part] += now() - started


def timing(part: str, function):
    """The function, its time counted under a part."""

    def run(*args, **kwargs):
        with timed(part):
            return function(*args, **kwargs)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "toy/backbone"))
    parser.add_argument("--train", default="runs/toy/train.jsonl")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model, G = DeScore.load(args.model), args.group_size
    model.set_trainable(args.lora_rank)
    model.keep_reference()
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=0.0)
    pairs = [pair for pair in read_pairs(args.train) if pair.human][: args.pairs]
    videos = [pair.winner_first().videos() for pair in pairs]
    step, prefill = model.decode_step, model.prefill
    for repeat in range(args.repeats + 1):  # the first is to warm up
        if repeat == 1:
            SPENT.clear()
        with timed("decode videos"):
            ((batch, _),) = read_ahead(model.processor, [videos])
        with timed("vision tower"):
            batch = model.encode(batch)
        model.decode_step, model.prefill = timing("decode steps", step), timing("prefill", prefill)
        with timed("thinking"):
            thoughts = model.think(batch, G, args.max_new_tokens, seeds=list(range(len(batch))))
        del model.decode_step, model.prefill
        with timed("reference"):
            reference = model.reference_logps(batch, thoughts.tokens, thoughts.mask)
        with timed("update: forward"):
            logps, scores = model.group(batch, thoughts.tokens, thoughts.mask)
            advantages = group_advantages(torch.randn_like(scores))
            loss, _ = grpo_loss(logps, thoughts.logps, reference, advantages, thoughts.mask)
            r_w, r_l = scores.view(-1, 2, G).unbind(1)
            loss = loss + 0.005 * bt_loss(r_w, r_l)
        with timed("update: backward"):
            loss.backward()
        with timed("optimiser"):
            optimizer.step()
            optimizer.zero_grad()
    SPENT["sampling"] = SPENT.pop("thinking") - SPENT["decode steps"] - SPENT["prefill"]
    whole = sum(SPENT.values())
    tokens = int(thoughts.mask.sum())
    print(f"{len(pairs)} pairs, groups of {G}, {batch.mask.sum(1).float().mean():.0f} tokens a prompt, "
          f"{tokens / thoughts.mask[..., 0].numel():.0f} a CoT; padding of the prompts "
          f"{1 - batch.mask.float().mean():.1%}; {whole / args.repeats:.2f} s a step\n")
    print("| part | s | share |\n| --- | ---: | ---: |")
    for part in ("decode videos", "vision tower", "prefill", "decode steps", "sampling", "reference",
                 "update: forward", "update: backward", "optimiser"):
        print(f"| {part} | {SPENT[part] / args.repeats:.3f} | {SPENT[part] / whole:.0%} |")


if __name__ == "__main__":
    run_command(main)
