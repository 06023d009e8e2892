"""Where the time of a stage-2 step goes: decode, tower, prefill, decode steps, reference, update, optimiser.

    python bench/step_profile.py                                  # the embedded default: 8 pairs, groups of 8
    python bench/step_profile.py --model runs/8b-coldstart --train train.jsonl --pairs 1 --max-new-tokens 512
    python bench/step_profile.py --size 20m --max-new-tokens 128  # one video of noise, as in bench/speed.py

Each part is timed by itself, the device waited for before and after, so that the parts add up to the step.
A second table, on a CPU, says of the machine's matrix products how many the step uses: the floating-point
operations of thinking, reference and update, over their seconds and over the speed of products alone,
measured in turn with them, with one thread and with all. Products of few rows are slower: beside it stands
the speed of those with the rows of a decode step.
"""

import argparse
import math
import statistics
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import speed

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


def attention_flop(query, key, causal: bool, products: int) -> int:
    """Of some products of queries (…, heads, L, d) with keys or values (…, P, d); half of a causal one is
    not computed."""
    flop = 2 * products * math.prod(query) * key[-2]
    return flop // 2 if causal else flop


def forward_flop(query, key, value, dropout=0.0, causal=False, **kwargs) -> int:
    return attention_flop(query, key, causal, 2)


def backward_flop(grad, query, key, value, out, logsumexp, dropout, causal, **kwargs) -> int:
    return attention_flop(query, key, causal, 5)  # the scores again, and four gradients


aten = torch.ops.aten
ATTENTION = {aten._scaled_dot_product_flash_attention_for_cpu: forward_flop,
             aten._scaled_dot_product_flash_attention_for_cpu_backward: backward_flop}


def product_speed(model: DeScore, rows: int) -> float:
    """Floating-point operations a second of the language model's products alone, one layer after another, on
    so many rows."""
    modules = [*model.qwen.model.language_model.modules(), model.qwen.lm_head]
    weights = [module.weight for module in modules if type(module) is torch.nn.Linear]
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1]) for weight in weights}
    started, flop = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < 0.5:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            flop += 2 * rows * weight.numel()
    return flop / seconds


class Step:
    """One step of stage 2, part by part."""

    def __init__(self, args):
        self.args = args
        if args.size:
            self.model = speed.make(args.size, "cpu")
            speed.never_ends(self.model)
        else:
            self.model = DeScore.load(args.model)
            pairs = [pair for pair in read_pairs(args.train) if pair.human][: args.pairs]
            self.videos = [pair.winner_first().videos() for pair in pairs]
        self.model.set_trainable(args.lora_rank)
        self.model.keep_reference()
        self.optimizer = torch.optim.AdamW(self.model.trainable().values(), lr=0.0)

    def read(self) -> None:
        with timed("decode videos"):
            if self.args.size:
                batch = speed.make_batch(self.model, 1, self.args.video_tokens)
            else:
                ((batch, _),) = read_ahead(self.model.processor, [self.videos])
        with timed("vision tower"):
            self.batch = self.model.encode(batch)

    def think(self) -> None:
        model = self.model
        model.decode_step = timing("decode steps", model.decode_step)
        model.prefill = timing("prefill", model.prefill)
        with timed("thinking"):
            self.thoughts = model.think(self.batch, self.args.group_size, self.args.max_new_tokens,
                                        seeds=list(range(len(self.batch))))
        del model.decode_step, model.prefill

    def refer(self) -> None:
        with timed("reference"):
            self.ref_logps = self.model.reference_logps(self.batch, self.thoughts.tokens, self.thoughts.mask)

    def update(self) -> None:
        thoughts = self.thoughts
        with timed("update: forward"):
            logps, scores = self.model.group(self.batch, thoughts.tokens, thoughts.mask)
            advantages = group_advantages(torch.randn_like(scores))
            loss, _ = grpo_loss(logps, thoughts.logps, self.ref_logps, advantages, thoughts.mask)
            loss = loss + 0.005 * speed.plain.bt_of(scores)
        with timed("update: backward"):
            loss.backward()
        with timed("optimiser"):
            self.optimizer.step()
            self.optimizer.zero_grad()


def print_parts(step: Step, repeats: int) -> None:
    """The first table: seconds of each part."""
    SPENT["sampling"] = SPENT.pop("thinking") - SPENT["decode steps"] - SPENT["prefill"]
    whole = sum(SPENT.values())
    mask = step.thoughts.mask
    prompt = step.batch.mask.sum(1).float().mean()
    cot = mask.sum() / mask[..., 0].numel()
    padding = 1 - step.batch.mask.float().mean()
    print(f"{len(mask)} videos, groups of {mask.shape[1]}, {prompt:.0f} tokens a prompt, {cot:.0f} a CoT; "
          f"padding of the prompts {padding:.1%}; {whole / repeats:.2f} s a step\n", flush=True)
    print("| part | s | share |\n| --- | ---: | ---: |")
    for part in ("decode videos", "vision tower", "prefill", "decode steps", "sampling", "reference",
                 "update: forward", "update: backward", "optimiser"):
        print(f"| {part} | {SPENT[part] / repeats:.3f} | {SPENT[part] / whole:.0%} |")


def print_shares(step: Step, repeats: int) -> None:
    """The second table: shares of the machine's matrix products, with one thread and with all."""
    parts = {"thinking": step.think, "reference": step.refer, "update": step.update}
    flop = {}
    for name, work in parts.items():
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            work()
        flop[name] = counter.get_total_flops()
    counts = ", ".join(f"{name} {count / 1e9:.0f}" for name, count in flop.items())
    few = step.thoughts.mask[..., 0].numel()  # rows of a decode step
    print(f"\nGFLOP: {counts}\n")
    print(f"| threads | products, GFLOP/s | of {few} rows | {' | '.join(parts)} | step |")
    print("| ---: " * 7 + "|", flush=True)
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        seconds = {name: [] for name in parts}
        speeds, of_few = [], []
        for _ in range(repeats):
            for name, work in parts.items():
                speeds.append(product_speed(step.model, 2048))
                of_few.append(product_speed(step.model, few))
                started = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - started)
        fastest = statistics.median(speeds)
        least = {name: count / fastest for name, count in flop.items()}  # seconds, were all products
        took = {name: statistics.median(seconds[name]) for name in parts}
        shares = [f"{least[name] / took[name]:.2f}" for name in parts]
        shares.append(f"{sum(least.values()) / sum(took.values()):.2f}")
        speed_of_few = statistics.median(of_few)
        print(f"| {threads} | {fastest / 1e9:.0f} | {speed_of_few / 1e9:.0f} | {' | '.join(shares)} |",
              flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "toy/backbone"))
    parser.add_argument("--train", default="runs/toy/train.jsonl")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", choices=speed.SIZES, help="random weights and noise in place of a model")
    parser.add_argument("--video-tokens", type=int, default=1200, help="with --size")
    args = parser.parse_args()
    step = Step(args)
    for repeat in range(args.repeats + 1):  # the first is to warm up
        if repeat == 1:
            SPENT.clear()
        step.read()
        step.think()
        step.refer()
        step.update()
    print_parts(step, args.repeats)
    if step.model.device.type == "cpu":
        print_shares(step, args.repeats)


if __name__ == "__main__":
    run_command(main)
