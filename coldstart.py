"""Stage 1: discriminative cold start. The model learns to score with the Bradley-Terry loss.

    python coldstart.py    # the embedded default, one process
    torchrun --nproc_per_node 8 coldstart.py --model Qwen/Qwen3-VL-8B-Instruct --train train.jsonl

For each pair of videos, scored behind their CoTs,

    L_BT = −E log σ(r_w − r_l)

With probability p the CoTs of a pair are masked, so that r must be readable from the video
alone as well.
"""

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data import DataError, Pair, Processor, keys_of, per_video
from model import OWN, DeScore
from support.batches import chunks, draw_seed, plan_step, prompt_lengths
from support.command import Count, NotNegative, Positive, Share, Whole, run_command
from support.formats import read_pairs
from support.means import Means
from support.optimize import adamw, all_reduce, clip
from support.ranks import Ranks
from support.run import Run, check_said, due, prepare, progress, read_tests, show
from support.settings import RunArgs, parse_args, setting


@dataclass
class Args(RunArgs):
    """Stage 1 (DeScore, Section "Stage 1"; rate and p from the released code)."""

    out: str = setting("runs/coldstart", "the run's folder")
    mask_p: Share = setting(0.5, "p: chance that the CoTs of a pair are masked")
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
    the others'. Any one shape for both; `weight` 0 leaves a pair out; `count` is what the sum is
    divided by, by default the number of terms. Returns a scalar."""
    losses = -F.logsigmoid(r_w - r_l) * weight
    if count is None:
        count = losses.numel()
    return losses.sum() / count


def mask_pairs(count: int, p: float, seed: int, step: int) -> list[bool]:
    """Which of a step's pairs lose their CoTs, both videos of a pair together. step: from 0."""
    generator = torch.Generator().manual_seed(draw_seed(seed, step))
    coins = torch.rand(count, generator=generator)
    return (coins < p).tolist()


def order(count: int, epochs: int, seed: int) -> list[int]:
    """The order in which the pairs are seen, by their numbers: each once an epoch, shuffled anew. A
    batch may begin in one epoch and end in the next."""
    sequence = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(draw_seed(seed, epoch))
        sequence += torch.randperm(count, generator=generator).tolist()
    return sequence


def make_plan(args: Args, pairs: list[Pair], processor: Processor, ranks: Ranks) -> list:
    """Which pairs each step takes, in this rank's micro-batches of like length (`plan_step`; a step
    has one update). Those that are masked say so already: their CoTs are None."""
    plan = []
    lengths = prompt_lengths(processor, keys_of(pairs), ranks)
    sequence = order(len(pairs), args.epochs, args.seed)
    for step, rows in enumerate(chunks(sequence, args.batch_size)):
        batch = [pairs[row] for row in rows]
        masked = mask_pairs(len(batch), args.mask_p, args.seed, step)
        for place, is_masked in enumerate(masked):
            if is_masked:
                batch[place] = batch[place].masked()
        sizes = []
        for pair in batch:
            tokens = []
            for key, cot in zip(pair.videos(), pair.said("cot")):
                cot_tokens = len(processor.encode_cot(cot))
                tokens.append(lengths[key] + cot_tokens + 1)  # and [Reward]
            sizes.append(len(tokens) * max(tokens))  # a row a video, all as wide as the widest
        plan.append(plan_step(batch, sizes, args.max_tokens, ranks))
    return plan


def main() -> None:
    ranks = Ranks.start()  # those that torchrun started, or this process alone
    args = parse_args(Args, "coldstart")
    run = Run(args, "coldstart", ranks)
    torch.manual_seed(args.seed)

    # What trains: [Reward] and the head, LoRA or the whole language model, the mergers.
    model = DeScore.load(
        args.model, video=args.video, quant=args.quant,
        reader=args.reader, layout="ours")
    model.processor.use_instruction(args.instruction)
    model.set_trainable(args.lora_rank, args.train_merger, args.train_vision)
    prepare(model, args, ranks)
    trainable = model.trainable()
    own = [p for name, p in trainable.items() if name.startswith(OWN)]
    rest = [p for name, p in trainable.items() if not name.startswith(OWN)]
    parameters = own + rest
    head_lr = args.lr if args.head_lr is None else args.head_lr
    rates = [head_lr, args.lr]
    groups = [
        {"params": own, "lr": head_lr},
        {"params": rest, "lr": args.lr},
    ]
    optimizer = adamw(groups, args.weight_decay, args.optim)

    # What it learns from: a tie has no winner, and teaches nothing here.
    pairs = read_pairs(args.train, args.label, args.root, model.processor.dimensions)
    tests = read_tests(args, model.processor.dimensions)
    run.train_on(pairs)  # the file as it is: its rows count for --max-skipped, and for a resume
    ties = sum(pair.preference == "tie" for pair in pairs)
    run.say(f"{pairs.summary()}; {ties} of them ties, which have no winner")
    pairs = [pair for pair in pairs if pair.preference != "tie"]
    if not pairs:
        raise DataError(f"{args.train}: nothing but ties, from which nothing is learnt here")
    check_said(args.train, pairs, "cot", "CoTs (see tools.annotate)")
    pairs = [pair.winner_first() for pair in pairs]
    plan = make_plan(args, pairs, model.processor, ranks)
    last = len(plan)
    warmup = max(1, round(args.warmup * last))

    done = run.resume(model, optimizer)  # steps of an earlier start; what `save` is to keep
    run.write_settings(model, last)
    videos = run.read_ahead(plan[done:], model)
    if done == 0 and args.eval_before:
        figures = run.evaluate(0, model, tests)
        run.save_if_best(0, model, figures)
    model.train()
    step = done
    bar = progress("coldstart", done, last, ranks)
    for step in bar:
        started = time.time()
        means = Means()
        (micro_batches,) = run.read(plan[step - 1], videos, model)  # one update a step
        readable = sum(micro.weight.sum().item() for micro in micro_batches)
        (readable,) = ranks.sum([readable])  # pairs of the batch, on all ranks
        rise = min(1.0, step / warmup)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * rise

        for micro in micro_batches:
            cots = per_video(micro.items, "cot")  # None where masked
            scores = model.score(micro.batch, cots)  # winner, loser, winner, …
            r_w, r_l = scores.view(-1, 2).unbind(1)  # (pairs,)
            L_BT = bt_loss(r_w, r_l, max(1.0, readable), micro.weight)
            L_BT.backward()
            means.total(micro.weight, loss=L_BT)
            means.add(micro.weight, accuracy=r_w > r_l, margin=r_w - r_l)

        all_reduce(parameters, ranks)  # a sum: each loss divides by the count over all ranks
        norm = clip(parameters, args.max_grad_norm)
        if 0 < norm < math.inf:  # 0: nothing counted, and AdamW would move the weights all the same
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.check_gradient(norm)

        means.add(grad_norm=norm, left_out=not math.isfinite(norm))
        means.add(lr=args.lr * rise)
        figures = means.over(ranks)
        run.log({"step": step, **figures, "seconds": time.time() - started})
        show(bar, figures, "loss", "accuracy", "margin")
        if due(step, args.eval_every) and step < last:  # the last is evaluated below
            figures = run.evaluate(step, model, tests)
            run.save_if_best(step, model, figures)
        stop = run.asked_to_stop()
        if stop or step == last or due(step, args.save_every):
            run.save(step)
        if stop:
            return run.stopped(step, last)

    run.save_model(model)
    figures = run.evaluate(step, model, tests)
    run.save_if_best(step, model, figures)
    run.finish(figures)


if __name__ == "__main__":
    run_command(main)
