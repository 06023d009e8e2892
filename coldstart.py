"""Stage 1: discriminative cold start. The model learns to score with the Bradley-Terry loss.

    python coldstart.py                                   # the embedded default, one process
    torchrun --nproc_per_node 8 coldstart.py --backbone Qwen/Qwen3-VL-8B-Instruct --train train.jsonl

For each pair of videos, scored behind their CoTs,

    L_BT = −E log σ(r_w − r_l)

With probability p the CoTs of a pair are masked, so that r must be readable from the video alone as well.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from data import MAX_TOKENS, DataError, Pair, Processor, Skipped, packed, read_pairs
from infer import evaluate, read_tests
from model import DeScore, draw_seed
from run import Ranks, Run, make_optimizer, parse_args


@dataclass
class Args:
    backbone: str | None = HfArg(default=None, aliases=["--model"],
                                 help="a Qwen3-VL, directory or hub id [the embedded default]")
    train: str | None = HfArg(default=None, help="pair file to train on; its CoTs are read")
    test: list[str] = HfArg(default_factory=list, help="pair files to evaluate on")
    label: str | None = HfArg(default=None, help="their column of the preference [TA, else Overall]")
    root: str | None = HfArg(default=None, help="folder that their paths are relative to [each file's own]")
    max_skipped: float = HfArg(default=0.01, help="share of the pairs whose videos may be unreadable")
    out: str = HfArg(default="runs/coldstart", help="the run's folder: metrics, checkpoints, the model")
    seed: int = HfArg(default=0, help="order of the data, masking, initial query and head")
    # The method (DeScore, Section "Stage 1"; learning rate and p from the released code).
    mask_p: float = HfArg(default=0.5, help="p: chance that the CoTs of a pair are masked")
    epochs: int = HfArg(default=2, help="passes over the pairs")
    batch_size: int = HfArg(default=32, help="pairs a step, over all ranks")
    lr: float = HfArg(default=2e-6, help="learning rate after warm-up, constant")
    head_lr: float | None = HfArg(default=None, help="learning rate of [Reward] and the head [lr]")
    warmup: float = HfArg(default=0.05, help="share of the steps in which the rate rises to lr")
    weight_decay: float = HfArg(default=0.01, help="AdamW")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are clipped to this norm")
    lora_rank: int = HfArg(default=64, help="adapters on the language model; 0 trains all of it")
    train_merger: bool = HfArg(default=True, help="train the vision tower's mergers")
    train_vision: bool = HfArg(default=False, help="train the rest of the vision tower")
    max_prompt: int = HfArg(default=6144, help="tokens of a prompt; pairs with longer ones are left out")
    # Videos.
    fps: float = HfArg(default=2.0, help="frames sampled a second")
    min_pixels: int = HfArg(default=128 * 32 * 32, help="pixels a frame, at least")
    max_pixels: int = HfArg(default=448 * 448, help="pixels a frame, at most")
    # Running.
    max_tokens: int = HfArg(default=24_576, help="tokens at a time, padding included; one pair at least")
    gradient_checkpointing: bool = HfArg(default=True, help="less memory, one more forward")
    quant: Literal["4bit"] | None = HfArg(default=None, help="keep the frozen linear layers in NF4")
    optim: Literal["adamw", "adamw8bit"] = HfArg(default="adamw", help="8 bits: smaller moments")
    shard: Literal["full"] | None = HfArg(default=None, help="split all that trains over ranks (FSDP2)")
    save_every: int = HfArg(default=50, help="steps from one checkpoint to the next; 0: at the end only")
    keep: int = HfArg(default=2, help="checkpoints kept")
    resume: bool = HfArg(default=True, help="go on from the newest checkpoint in the run's folder")
    workers: int = HfArg(default=2, help="processes that decode videos ahead")
    eval_before: bool = HfArg(default=True, help="evaluate before the first step")
    eval_every: int = HfArg(default=0, help="evaluate every so many steps too [never]")
    eval_tokens: int = HfArg(default=MAX_TOKENS, help="tokens at a time in evaluation")
    eval_temperature: float = HfArg(default=1.0, help="of the CoTs in evaluation; 1 is the policy itself")
    max_new_tokens: int = HfArg(default=4096, help="longest CoT in evaluation")


def bt_loss(r_w: torch.Tensor, r_l: torch.Tensor) -> torch.Tensor:
    """L_BT = −E log σ(r_w − r_l), the Bradley-Terry loss of the preferred videos' scores over the others'.
    Any one shape for both; returns a scalar."""
    return -F.logsigmoid(r_w - r_l).mean()


def mask_pairs(count: int, p: float, seed: int, step: int) -> list[bool]:
    """Which of a step's pairs lose their CoTs, both videos of a pair together."""
    generator = torch.Generator().manual_seed(draw_seed(seed, step))
    return (torch.rand(count, generator=generator) < p).tolist()


def order(count: int, epochs: int, seed: int) -> list[int]:
    """The order in which the pairs are seen: each once an epoch, shuffled anew."""
    generators = [torch.Generator().manual_seed(draw_seed(seed, epoch)) for epoch in range(epochs)]
    return torch.cat([torch.randperm(count, generator=generator) for generator in generators]).tolist()


def winner_first(pair: Pair, masked: bool) -> tuple[list[tuple[str, str]], list[str | None]]:
    """The (video, prompt) keys of a pair, the preferred one first, and their CoTs."""
    keys, cots = pair.videos(), [pair.cot_a, pair.cot_b]
    if pair.preference == "B":
        keys, cots = keys[::-1], cots[::-1]
    return keys, [None, None] if masked else cots


def pair_tokens(processor: Processor, keys: list[tuple[str, str]], cots: list[str | None]) -> int:
    """Tokens of a pair's two rows, the shorter one padded."""
    return 2 * max(length + len(processor.encode(cot or ""))
                   for length, cot in zip(processor.lengths(keys), cots))


def chunks(items: list, size: int) -> list[list]:
    """A list cut into lists of the given size, the last one shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def main() -> None:
    ranks = Ranks.start()
    args = parse_args(Args, "toy/coldstart.json", ranks)
    run = Run(args, ranks)

    if args.backbone is None:
        raise DataError("--train needs --backbone, a Qwen3-VL directory or hub id")
    torch.manual_seed(args.seed)
    video = {"fps": args.fps, "min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
    model = DeScore.load(args.backbone, video=video, quant=args.quant)
    model.set_trainable(args.lora_rank, args.train_merger, args.train_vision)
    if args.gradient_checkpointing:
        model.qwen.activation_checkpointing_enable()
    if args.shard:
        model.shard()
    own, rest = model.parameter_groups()
    own["lr"] = args.head_lr or args.lr
    optimizer = make_optimizer(args.optim, [own, rest], args.lr, args.weight_decay)
    rates = [group["lr"] for group in optimizer.param_groups]

    data = read_pairs(args.train, args.label, args.root)
    skipped = Skipped(run.out / "skipped.jsonl", data, args.max_skipped, write=ranks.first)
    pairs = [pair for pair in data if pair.preference != "tie"]  # a tie has no winner
    if ranks.first:
        print(f"{data.summary()}; {len(data) - len(pairs)} ties, which have no winner, are not used")
        print(model.summary())
    for pair in pairs:
        if pair.cot_a is None or pair.cot_b is None:
            raise DataError(f"{args.train}: the pair of {pair.video_a} has no CoTs; "
                            "`python data.py annotate` writes them")
    steps = chunks(order(len(pairs), args.epochs, args.seed), args.batch_size)
    warmup = max(1, round(args.warmup * len(steps)))
    tests = read_tests(args.test, args.label, args.root)
    done = run.begin(model, optimizer, skipped)

    def test(step: int) -> dict[str, float]:
        figures = evaluate(model, tests, ranks, args.max_new_tokens, args.eval_temperature, args.eval_tokens,
                           args.workers)
        run.log({"step": step, **figures})
        return figures

    # What this rank reads, decoded ahead: for each step its share of the pairs, like lengths in one forward.
    masks = [mask_pairs(len(rows), args.mask_p, args.seed, step) for step, rows in enumerate(steps)]
    shares = [[winner_first(pairs[row], masked) for row, masked in ranks.share(list(zip(rows, mask)))]
              for rows, mask in zip(steps, masks)]
    model.processor.lengths([key for share in shares for keys, _ in share for key in keys])
    plan = [packed(share, [pair_tokens(model.processor, *unit) for unit in share], args.max_tokens)
            for share in shares]
    to_read = [[keys for keys, _ in micro] for micros in plan[done:] for micro in micros]
    batches = model.processor.batches(to_read, args.workers, limit=args.max_prompt)
    if done == 0 and args.eval_before:
        test(0)
    model.train()
    progress = tqdm(range(done + 1, len(steps) + 1), "coldstart", initial=done, total=len(steps),
                    disable=not ranks.first)
    for step in progress:
        started, loss_sum, right, margin = time.time(), 0.0, 0.0, 0.0
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * min(1.0, step / warmup)
        ready = [(micro, *next(batches)) for micro in plan[step - 1]]
        skipped.add(ranks.gather_all([record for _, _, _, bad in ready for record in bad]))
        (count,) = ranks.sum([float(sum(len(kept) for _, _, kept, _ in ready))])  # pairs in the global batch
        ready = [(micro, batch, kept) for micro, batch, kept, _ in ready if kept]
        turns = ranks.most(len(ready)) if args.shard else 0  # all ranks gather a sharded model, or none
        for micro, batch, kept in ready:
            rewards = model.score(batch, [cot for i in kept for cot in micro[i][1]])
            r_w, r_l = rewards.view(-1, 2).unbind(1)
            loss = bt_loss(r_w, r_l) * len(kept) / count
            loss.backward()
            loss_sum += loss.item()
            right += (r_w > r_l).sum().item() / count
            margin += (r_w - r_l).sum().item() / count
        for _ in range(turns - len(ready)):
            model.idle(with_logps=False)
        norm = run.descend(args.max_grad_norm)
        loss_sum, right, margin = ranks.sum([loss_sum, right, margin])
        run.log({"step": step, "loss": loss_sum, "accuracy": right, "margin": margin, "grad_norm": norm,
                 "left_out": float(not math.isfinite(norm)), "lr": optimizer.param_groups[-1]["lr"],
                 "seconds": time.time() - started})
        progress.set_postfix(loss=f"{loss_sum:.3f}", accuracy=f"{right:.2f}", margin=f"{margin:.2f}")
        if args.eval_every and step % args.eval_every == 0 and step < len(steps):
            test(step)
        if run.step_done(step, len(steps)):
            return ranks.stop()
    figures = test(len(steps))
    scale = {key.split("/")[1]: value for key, value in figures.items() if "/score_" in key}
    model.save(run.out / "model", ranks.first, stage="coldstart", args=asdict(args), **scale)
    if ranks.first:
        print(json.dumps(figures, indent=1))
        print(f"{run.out}: done")
    ranks.stop()


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
