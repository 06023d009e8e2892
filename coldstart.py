"""Stage 1: discriminative cold start. The model learns to score with the Bradley-Terry loss.

    python coldstart.py    # the embedded default, one process
    torchrun --nproc_per_node 8 coldstart.py --model Qwen/Qwen3-VL-8B-Instruct --train train.jsonl

For each pair of videos, scored behind their CoTs,

    L_BT = −E log σ(r_w − r_l)

With probability p the CoTs of a pair are masked, so that r must be readable from the video
alone as well. Beyond the paper, `--mask expected` takes the expectation over that coin,
(1 − p) L_BT with the CoTs + p L_BT without them, both from one forward.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Pair, keys_of, per_video
from model import OWN, DeScore
from support.batches import chunks, draw_seed, prompt_lengths
from support.command import Count, NotNegative, Positive, Share, Whole, run_command
from support.run import Run, Unit
from support.settings import RunArgs, setting


@dataclass
class Args(RunArgs):
    """Stage 1 (DeScore, Section "Stage 1"; rate and p from the released code)."""

    out: str = setting("runs/coldstart", "the run's folder")
    mask_p: Share = setting(0.5, "p: chance that the CoTs of a pair are masked")
    mask: Literal["coin", "expected"] = setting("coin", "a coin a pair, or its expectation")
    epochs: Count = setting(2, "passes over the pairs")
    batch_size: Count = setting(32, "pairs a step, over all ranks")
    lr: NotNegative = setting(2e-6, "learning rate after warm-up, constant")
    head_lr: NotNegative | None = setting(None, "of [Reward] and head [lr]")
    warmup: Share = setting(0.05, "share of the steps it takes to rise")
    weight_decay: NotNegative = setting(0.01, "AdamW")
    max_grad_norm: Positive = setting(1.0, "gradients are clipped to it")
    lora_rank: Whole = setting(64, "adapters on the language model; 0: all of it")
    train_merger: bool = setting(True, "train the vision tower's mergers")
    train_vision: bool = setting(False, "train the rest of the vision tower")
    max_pixels: Count = setting(448 * 448, "pixels a frame, at most")
    max_prompt: Whole = setting(6144, "longest prompt in tokens; 0: any")
    max_tokens: Count = setting(24_576, "tokens at a time; a pair at least")


def bt_loss(
        r_w: Tensor, r_l: Tensor, count: float | None = None,
        weight: Tensor | float = 1.0) -> Tensor:
    """L_BT = −E log σ(r_w − r_l), the Bradley-Terry loss of the preferred videos' scores over
    the others'. Any one shape for both; `weight` 0 leaves a pair out; `count` is the number of
    terms that E is a mean of, where these are a part of them. Returns a scalar."""
    losses = -F.logsigmoid(r_w - r_l) * weight
    return losses.sum() / (losses.numel() if count is None else count)


def mask_pairs(count: int, p: float, seed: int, step: int) -> list[bool]:
    """Which of a step's pairs lose their CoTs, both videos of a pair together."""
    generator = torch.Generator().manual_seed(draw_seed(seed, step))
    return (torch.rand(count, generator=generator) < p).tolist()


def order(count: int, epochs: int, seed: int) -> list[int]:
    """The order in which the pairs are seen: each once an epoch, shuffled anew."""
    seen = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(draw_seed(seed, epoch))
        seen += torch.randperm(count, generator=generator).tolist()
    return seen


def make_plan(args: Args, pairs: list[Pair], run: Run) -> list:
    """Which pairs each step takes, masked or not, in micro-batches of like length."""
    plan, processor = [], run.model.processor
    p = args.mask_p if args.mask == "coin" else 0.0
    lengths = prompt_lengths(processor, keys_of(pairs), run.ranks)
    seen = order(len(pairs), args.epochs, args.seed)
    for step, rows in enumerate(chunks(seen, args.batch_size)):
        masked = mask_pairs(len(rows), p, args.seed, step)
        units, sizes = [], []
        for place, row in enumerate(rows):
            pair = pairs[row]
            if masked[place]:
                pair = replace(pair, cot_a=None, cot_b=None)
            a, b = (len(processor.encode_cot(cot)) for cot in (pair.cot_a, pair.cot_b))
            key_a, key_b = pair.videos()
            units.append(Unit(pair, place))
            sizes.append(2 * max(lengths[key_a] + a, lengths[key_b] + b))
        plan.append([run.deal(units, sizes, args.max_tokens)])
    return plan


def main() -> None:
    run = Run(Args, "coldstart", shown=("loss", "accuracy", "margin"))
    args = run.args
    torch.manual_seed(args.seed)
    model = DeScore.load(args.model, video=args.video, quant=args.quant, reader=args.reader,
                         layout="ours")
    model.processor.use_instruction(args.instruction)
    model.set_trainable(args.lora_rank, args.train_merger, args.train_vision)
    own = [name for name in model.trainable() if name.startswith(OWN)]
    rest = [name for name in model.trainable() if name not in own]
    head_lr = args.lr if args.head_lr is None else args.head_lr
    groups = [{"params": own, "lr": head_lr}, {"params": rest, "lr": args.lr}]
    optimizer = run.prepare(model, groups, args.weight_decay)
    rates = [group["lr"] for group in groups]
    pairs = run.read_train("cot", "CoTs (see tools.annotate)", ties=False)  # no winner
    plan = make_plan(args, pairs, run)
    warmup = max(1, round(args.warmup * len(plan)))
    both_ways = args.mask == "expected"
    share = torch.tensor([1 - args.mask_p, args.mask_p] if both_ways else [1.0])

    for step, (micro_batches,) in run.steps(plan):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * min(1.0, step / warmup)
        (count,) = run.sum(sum(micro.weight.sum() for micro in micro_batches))
        for micro in micro_batches:
            scores = model.score(micro.batch, per_video(micro.pairs, "cot"), without_cot=both_ways)
            r_w, r_l = scores.view(-1, 2, len(share)).unbind(1)  # (pairs, 1), or (pairs, 2)
            weight = micro.weight[:, None] * share.to(scores.device)
            L_BT = bt_loss(r_w, r_l, count, weight)
            L_BT.backward()
            run.means.total(micro.weight, loss=L_BT)
            run.means.add(weight, accuracy=(r_w > r_l).float(), margin=r_w - r_l)
        run.descend(args.max_grad_norm)
        run.means.add(lr=optimizer.param_groups[-1]["lr"])


if __name__ == "__main__":
    run_command(main)
