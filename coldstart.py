"""Stage 1: discriminative cold start. The model learns to score with the Bradley-Terry loss.

    python coldstart.py                                   # the embedded default, one process
    torchrun --nproc_per_node 8 coldstart.py --backbone Qwen/Qwen3-VL-8B-Instruct --train train.jsonl --test test.jsonl

For each pair of videos, scored behind their CoTs,

    L_BT = −E log σ(r_w − r_l)

With probability p the CoTs of a pair are masked, so that r must be readable from the video alone as well.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import DataError, Pair, Skipped, read_pairs
from infer import evaluate
from model import DeScore, Ranks, draw_seed, parse_args


@dataclass
class Args:
    backbone: str | None = field(default=None, metadata={"help": "a Qwen3-VL, directory or hub id [the embedded default]",
                                                         "aliases": ["--model"]})
    train: str | None = field(default=None, metadata={"help": "pair file to train on; its CoTs are read"})
    test: list[str] = field(default_factory=list, metadata={"help": "pair files to evaluate on"})
    label: str | None = field(default=None, metadata={"help": "their column of the preference [TA, else Overall]"})
    root: str | None = field(default=None, metadata={"help": "folder that their paths are relative to [each file's own]"})
    max_skipped: float = field(default=0.01, metadata={"help": "share of the pairs whose videos may be unreadable"})
    out: str = field(default="runs/coldstart", metadata={"help": "the run's folder: metrics.jsonl and the model"})
    seed: int = field(default=0, metadata={"help": "order of the data, masking, initial query and head"})
    # The method (DeScore, Section "Stage 1"; learning rate and p from the released code).
    mask_p: float = field(default=0.5, metadata={"help": "p: chance that the CoTs of a pair are masked"})
    epochs: int = field(default=2, metadata={"help": "passes over the pairs"})
    batch_size: int = field(default=32, metadata={"help": "pairs a step, over all ranks"})
    lr: float = field(default=2e-6, metadata={"help": "learning rate after warm-up, constant"})
    head_lr: float | None = field(default=None, metadata={"help": "learning rate of [Reward] and the head [lr]"})
    warmup: float = field(default=0.05, metadata={"help": "share of the steps in which the rate rises to lr"})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    lora_rank: int = field(default=64, metadata={"help": "adapters on the language model; 0 trains all of it"})
    train_merger: bool = field(default=True, metadata={"help": "train the vision tower's mergers"})
    train_vision: bool = field(default=False, metadata={"help": "train the rest of the vision tower"})
    max_prompt: int = field(default=6144, metadata={"help": "tokens of a prompt; pairs with longer ones are left out"})
    # Videos.
    fps: float = field(default=2.0, metadata={"help": "frames sampled a second"})
    min_pixels: int = field(default=128 * 32 * 32, metadata={"help": "pixels a frame, at least"})
    max_pixels: int = field(default=448 * 448, metadata={"help": "pixels a frame, at most"})
    # Running.
    micro_batch: int = field(default=2, metadata={"help": "pairs a forward"})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "less memory, one more forward"})
    workers: int = field(default=2, metadata={"help": "processes that decode videos ahead"})
    eval_every: int = field(default=0, metadata={"help": "evaluate every so many steps too [before and after only]"})
    eval_batch: int = field(default=16, metadata={"help": "videos at a time in evaluation"})
    eval_temperature: float = field(default=1.0, metadata={"help": "of the CoTs in evaluation; 1 is the policy itself"})
    max_new_tokens: int = field(default=4096, metadata={"help": "longest CoT in evaluation"})


def bt_loss(r_w: torch.Tensor, r_l: torch.Tensor) -> torch.Tensor:
    """L_BT = −E log σ(r_w − r_l), the Bradley-Terry loss of the preferred videos' scores over the others'. Any one shape
    for both; returns a scalar."""
    return -F.logsigmoid(r_w - r_l).mean()


def mask_pairs(count: int, p: float, seed: int, step: int) -> list[bool]:
    """Which of a step's pairs lose their CoTs, both videos of a pair together."""
    generator = torch.Generator().manual_seed(draw_seed(seed, step))
    return (torch.rand(count, generator=generator) < p).tolist()


def order(count: int, epochs: int, seed: int) -> list[int]:
    """The order in which the pairs are seen: each once an epoch, shuffled anew."""
    shuffles = (torch.randperm(count, generator=torch.Generator().manual_seed(draw_seed(seed, e))) for e in range(epochs))
    return torch.cat(list(shuffles)).tolist()


def winner_first(pair: Pair, masked: bool) -> tuple[list[tuple[str, str]], list[str | None]]:
    """The (video, prompt) keys of a pair, the preferred one first, and their CoTs."""
    keys, cots = pair.videos(), [pair.cot_a, pair.cot_b]
    if pair.preference == "B":
        keys, cots = keys[::-1], cots[::-1]
    return keys, [None, None] if masked else cots


def chunks(items: list, size: int) -> list[list]:
    """A list cut into lists of the given size, the last one shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def main() -> None:
    ranks = Ranks.start()
    args = parse_args(Args, "toy/coldstart.json", ranks)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    if args.backbone is None:
        raise DataError("--train needs --backbone, a Qwen3-VL directory or hub id")
    torch.manual_seed(args.seed)
    video = {"fps": args.fps, "min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
    model = DeScore.load(args.backbone, video=video)
    model.set_trainable(args.lora_rank, args.train_merger, args.train_vision)
    if args.gradient_checkpointing:
        model.qwen.activation_checkpointing_enable()
    parameters = model.trainable()
    own = [p for name, p in parameters.items() if name in ("query", "head.weight")]
    rest = [p for name, p in parameters.items() if name not in ("query", "head.weight")]
    optimizer = torch.optim.AdamW([{"params": own, "lr": args.head_lr or args.lr}, {"params": rest}], lr=args.lr,
                                  weight_decay=args.weight_decay)

    data = read_pairs(args.train, args.label, args.root)
    skipped = Skipped(out / "skipped.jsonl", data, args.max_skipped, write=ranks.first)
    pairs = [pair for pair in data if pair.preference != "tie"]  # a tie has no winner
    if ranks.first:
        print(f"{data.summary()}; {len(data) - len(pairs)} ties, which have no winner, are not used")
    for pair in pairs:
        if pair.cot_a is None or pair.cot_b is None:
            raise DataError(f"{args.train}: the pair of {pair.video_a} has no CoTs; `python data.py annotate` writes them")
    seen = order(len(pairs), args.epochs, args.seed)
    steps = chunks(seen, args.batch_size)
    warmup = max(1, round(args.warmup * len(steps)))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    tests = {Path(path).stem: read_pairs(path, args.label, args.root) for path in args.test}
    metrics = (out / "metrics.jsonl").open("w") if ranks.first else None

    def log(record: dict) -> None:
        if ranks.first:
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()

    def test(step: int) -> dict:
        figures = {}
        for name, held_out in tests.items():
            figures |= {f"{name}/{key}": value for key, value in evaluate(
                model, held_out, ranks, args.max_new_tokens, args.eval_temperature, args.eval_batch,
                args.workers).items()}
        log({"step": step, **figures})
        return figures

    # What this rank reads: for each step its share of the pairs, in micro-batches, decoded ahead.
    plan = [chunks([winner_first(pairs[row], masked) for row, masked in ranks.share(list(zip(
        rows, mask_pairs(len(rows), args.mask_p, args.seed, step))))], args.micro_batch) for step, rows in enumerate(steps)]
    batches = model.processor.batches([[keys for keys, _ in micro] for micros in plan for micro in micros], args.workers,
                                      limit=args.max_prompt)
    test(0)
    model.train()
    progress = tqdm(steps, "coldstart", disable=not ranks.first)
    for step, rows in enumerate(progress, 1):
        started, loss_sum, right, margin = time.time(), 0.0, 0.0, 0.0
        ready = [(micro, *next(batches)) for micro in plan[step - 1]]
        skipped.add(ranks.gather_all([record for _, _, _, bad in ready for record in bad]))
        (count,) = ranks.sum([float(sum(len(kept) for _, _, kept, _ in ready))])  # pairs in the global batch
        for micro, batch, kept, _ in ready:
            if not kept:
                continue
            rewards = model.score(batch, [cot for i in kept for cot in micro[i][1]])
            r_w, r_l = rewards.view(-1, 2).unbind(1)
            loss = bt_loss(r_w, r_l) * len(kept) / count
            loss.backward()
            loss_sum += loss.item()
            right += (r_w > r_l).sum().item() / count
            margin += (r_w - r_l).sum().item() / count
        ranks.sum_gradients(list(parameters.values()))
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss_sum, right, margin = ranks.sum([loss_sum, right, margin])
        log({"step": step, "loss": loss_sum, "accuracy": right, "margin": margin, "grad_norm": norm.item(),
             "lr": schedule.get_last_lr()[-1], "seconds": time.time() - started})
        progress.set_postfix(loss=f"{loss_sum:.3f}", accuracy=f"{right:.2f}", margin=f"{margin:.2f}")
        schedule.step()
        if args.eval_every and step % args.eval_every == 0 and step < len(steps):
            test(step)
    figures = test(len(steps))
    if ranks.first:
        scale = {key.split("/")[1]: value for key, value in figures.items() if key.split("/")[1].startswith("score_")}
        model.save(out / "model", stage="coldstart", args=asdict(args), **scale)
        print(json.dumps(figures, indent=1))
        print(f"{out}: done")
    ranks.stop()


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        raise SystemExit(f"error: {error}") from error
