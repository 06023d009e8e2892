"""Stage 2: dual-objective reinforcement learning. GRPO trains the thinking, Bradley-Terry keeps the score.

    python rl.py                                          # the embedded default, after coldstart.py
    torchrun --nproc_per_node 8 rl.py --model runs/coldstart --train train.jsonl --test test.jsonl

For each video of a pair, G rollouts of the policy are rewarded and compared within their group; the same
rollouts, each followed by [Reward], are scored, and one forward and one backward serve both losses:

    A_i     = (R_i − mean(R)) / std(R)                           R = w_f R_f + w_q R_q + w_l R_l
    L_GRPO  = −E 1/G Σ_i 1/|o_i| Σ_k [ min(ρ A_i, clip(ρ, 1−ε, 1+ε) A_i) − β D_KL ]
    L       = L_GRPO + λ L_BT

What is not here: no critic, no reward model but the three rules below, no second copy of the model. π_old's
log-probabilities are those recorded while sampling; π_ref is this model with the adapter that stage 1 left.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from coldstart import bt_loss, chunks, order, winner_first
from data import (
    MAX_TOKENS,
    Batch,
    DataError,
    Skipped,
    agreement,
    follows_format,
    packed,
    parse_cot,
    read_pairs,
)
from infer import evaluate, read_tests
from model import DeScore, draw_seed
from run import Ranks, Run, make_optimizer, parse_args


@dataclass
class Args:
    model: str | None = HfArg(default=None, aliases=["--backbone"],
                              help="the model of stage 1 [runs/coldstart]")
    train: str | None = HfArg(default=None, help="pair file to train on; its reference sub-scores are read")
    test: list[str] = HfArg(default_factory=list, help="pair files to evaluate on")
    label: str | None = HfArg(default=None, help="their column of the preference [TA, else Overall]")
    root: str | None = HfArg(default=None, help="folder that their paths are relative to [each file's own]")
    max_skipped: float = HfArg(default=0.01, help="share of the pairs whose videos may be unreadable")
    out: str = HfArg(default="runs/rl", help="the run's folder: metrics, checkpoints, the model")
    seed: int = HfArg(default=0, help="order of the data and sampling")
    # The method (DeScore, Section "Stage 2").
    steps: int = HfArg(default=65, help="rollout batches")
    batch_size: int = HfArg(default=64, help="pairs a rollout batch, over all ranks: twice as many prompts")
    group_size: int = HfArg(default=8, help="G: rollouts a video")
    temperature: float = HfArg(default=1.0, help="of the sampling")
    top_p: float = HfArg(default=1.0, help="of the sampling")
    max_new_tokens: int = HfArg(default=4096, help="longest CoT")
    w_format: float = HfArg(default=0.1, help="w_f")
    w_quality: float = HfArg(default=0.7, help="w_q")
    w_length: float = HfArg(default=0.2, help="w_l")
    length_low: int = HfArg(default=500, help="tokens up to which R_l is 0")
    length_high: int = HfArg(default=2000, help="tokens from which R_l is 1")
    length_excess: int | None = HfArg(default=None, help="tokens from which R_l falls back to 0 [never]")
    clip_low: float = HfArg(default=0.2, help="ε below 1")
    clip_high: float = HfArg(default=0.2, help="ε above 1 (0.3 in the released code)")
    beta: float = HfArg(default=1e-5, help="β: weight of the KL term; 0 spares the reference's forward")
    bt_weight: float = HfArg(default=0.005, help="λ: weight of the auxiliary Bradley-Terry loss")
    updates: int = HfArg(default=1, help="optimiser steps a rollout batch, each on its share of the pairs")
    lr: float = HfArg(default=1e-6, help="learning rate, constant")
    weight_decay: float = HfArg(default=0.01, help="AdamW")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are clipped to this norm")
    lora_rank: int = HfArg(default=64, help="adapters on the language model, as in stage 1")
    train_merger: bool = HfArg(default=False, help="train the vision tower's mergers; π_ref shares them")
    # Videos.
    fps: float = HfArg(default=2.0, help="frames sampled a second")
    min_pixels: int = HfArg(default=128 * 32 * 32, help="pixels a frame, at least")
    max_pixels: int = HfArg(default=307_200, help="pixels a frame, at most")
    max_prompt: int = HfArg(default=6200, help="tokens of a prompt; pairs with longer ones are left out")
    # Running.
    max_tokens: int = HfArg(default=80_000, help="tokens at a time with the longest CoTs; one pair at least")
    attention: Literal["sdpa", "flex"] = HfArg(default="sdpa", help="of the update; flex: by blocks, on GPUs")
    gradient_checkpointing: bool = HfArg(default=True, help="less memory, one more forward")
    quant: Literal["4bit"] | None = HfArg(default=None, help="keep the frozen linear layers in NF4")
    optim: Literal["adamw", "adamw8bit"] = HfArg(default="adamw", help="8 bits: smaller moments")
    shard: Literal["full"] | None = HfArg(default=None, help="split all that trains over ranks (FSDP2)")
    save_every: int = HfArg(default=5, help="steps from one checkpoint to the next; 0: at the end only")
    keep: int = HfArg(default=2, help="checkpoints kept")
    resume: bool = HfArg(default=True, help="go on from the newest checkpoint in the run's folder")
    workers: int = HfArg(default=2, help="processes that decode videos ahead")
    eval_before: bool = HfArg(default=True, help="evaluate before the first step")
    eval_every: int = HfArg(default=0, help="evaluate every so many steps too [never]")
    eval_tokens: int = HfArg(default=MAX_TOKENS, help="tokens at a time in evaluation")
    eval_temperature: float = HfArg(default=1.0, help="of the CoTs in evaluation; 1 is the policy itself")


# ------------------------------------------------------------------------------------------------------------
# The three rewards of a rollout, each in [0, 1]


def format_reward(text: str) -> float:
    """R_f = 1 if the format is kept exactly, else 0."""
    return float(follows_format(text))


def quality_reward(text: str, gold: dict) -> float:
    """R_q = matching sub-scores / reference sub-scores; "N/A" must match too. 0 if no scores can be read."""
    cot = parse_cot(text)
    return agreement(cot["dimensional_scores"], gold) if cot else 0.0


def length_reward(n_tokens: int, low: int = 500, high: int = 2000, excess: int | None = None) -> float:
    """R_l = 0 up to `low` tokens, linear to 1 at `high`; from `excess` on, where set, it falls back to 0 with
    the same slope, for a thought can be too long as well."""
    rise = (n_tokens - low) / (high - low)
    fall = 1.0 if excess is None else 1.0 - (n_tokens - excess) / (high - low)
    return max(0.0, min(1.0, rise, fall))


# ------------------------------------------------------------------------------------------------------------
# Advantages and loss


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """A_i = (R_i − mean(R_1..G)) / std(R_1..G), rewards and advantages (B, G); std divides by G − 1.

    A group whose rewards are all equal, or that has one element, carries no signal: its advantages are 0."""
    spread = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True)
    has_signal = spread > 1e-6 * rewards.abs().amax(1, keepdim=True)  # equal but for rounding counts as equal
    std = rewards.std(1, keepdim=True) if rewards.shape[1] > 1 else torch.ones_like(spread)
    return torch.where(has_signal, (rewards - rewards.mean(1, keepdim=True)) / std, 0.0)


def grpo_loss(logps: torch.Tensor, old_logps: torch.Tensor, ref_logps: torch.Tensor | None,
              advantages: torch.Tensor, mask: torch.Tensor, clip_low: float = 0.2, clip_high: float = 0.2,
              beta: float = 1e-5) -> tuple[torch.Tensor, dict[str, float]]:
    """L_GRPO: each group's mean over its CoTs, of their means over tokens.

    logps (with gradient), old_logps, ref_logps and mask (B, G, C), advantages (B, G); ref_logps may be None
    if β is 0. An empty CoT contributes 0. Returns the scalar and a dict of detached figures, token means over
    all CoTs."""
    mask = mask.to(logps.dtype)
    log_ratio = (logps - old_logps) * mask
    ratio, A = log_ratio.exp(), advantages[..., None]  # ρ (B, G, C)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * A, clipped * A)
    kl = torch.zeros_like(ratio)
    if beta:
        to_ref = (ref_logps - logps) * mask
        kl = to_ref.exp() - to_ref - 1  # D_KL = π_ref/π_θ − log(π_ref/π_θ) − 1, per token, ≥ 0
    per_cot = ((objective - beta * kl) * mask).sum(-1) / mask.sum(-1).clamp(min=1)  # 1/|o_i| Σ_k
    with torch.no_grad():
        count = mask.sum().clamp(min=1)
        figures = {"clip_fraction": (((clipped * A < ratio * A) * mask).sum() / count).item(),
                   "kl": ((kl * mask).sum() / count).item()}
    return -per_cot.mean(), figures


# ------------------------------------------------------------------------------------------------------------
# The loop


# What is recorded of each rollout and averaged for the log.
RECORDED = ("reward", "reward_format", "reward_quality", "reward_length", "cot_tokens", "truncated",
            "entropy", "advantage_spread", "reward_range", "no_signal")


@dataclass
class Rollout:
    """Some pairs' rollouts and all that the update needs of them. B = 2 · pairs, preferred video first."""

    batch: Batch  # its videos encoded, unless the tower trains
    tokens: torch.Tensor  # (B, G, C)
    mask: torch.Tensor  # (B, G, C)
    old_logps: torch.Tensor  # (B, G, C)
    ref_logps: torch.Tensor | None  # (B, G, C)
    advantages: torch.Tensor  # (B, G)
    preferred: torch.Tensor  # (B / 2,) bool: False for a tie, which has no winner


def main() -> None:
    ranks = Ranks.start()
    args = parse_args(Args, "toy/rl.json", ranks)
    run = Run(args, ranks)

    torch.manual_seed(args.seed)
    video = {"fps": args.fps, "min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
    model = DeScore.load(args.model or "runs/coldstart", video=video, quant=args.quant)
    model.set_trainable(args.lora_rank, args.train_merger)
    if args.beta:
        model.keep_reference()
    if args.gradient_checkpointing:
        model.qwen.activation_checkpointing_enable()
    model.attention = args.attention
    if args.shard:
        model.shard()
    optimizer = make_optimizer(args.optim, list(model.parameter_groups()), args.lr, args.weight_decay)

    pairs = read_pairs(args.train, args.label, args.root)
    skipped = Skipped(run.out / "skipped.jsonl", pairs, args.max_skipped, write=ranks.first)
    if ranks.first:
        print(pairs.summary())
        print(model.summary())
    for pair in pairs:
        if pair.scores_a is None or pair.scores_b is None:
            raise DataError(f"{args.train}: the pair of {pair.video_a} has no reference sub-scores "
                            "(scores_a, scores_b)")
    tests = read_tests(args.test, args.label, args.root)
    G = args.group_size
    done = run.begin(model, optimizer, skipped)

    def test(step: int) -> dict[str, float]:
        figures = evaluate(model, tests, ranks, args.max_new_tokens, args.eval_temperature, args.eval_tokens,
                           args.workers)
        run.log({"step": step, **figures})
        return figures

    # Which pairs each optimiser step of each rollout batch takes, and this rank's share of them: those of
    # like length together, as many as may fill the cache of their thoughts.
    epochs = -(-args.steps * args.batch_size // len(pairs))
    seen = order(len(pairs), epochs, args.seed)
    steps = [list(enumerate(seen[step * args.batch_size : (step + 1) * args.batch_size]))
             for step in range(args.steps)]
    shares = [[ranks.share(part) for part in chunks(rows, -(-len(rows) // args.updates))] for rows in steps]
    model.processor.lengths([key for parts in shares for part in parts for _, row in part
                             for key in pairs[row].videos()])
    plan = [[packed(part, [2 * (max(model.processor.lengths(pairs[row].videos())) + G * args.max_new_tokens)
                           for _, row in part], args.max_tokens) for part in parts] for parts in shares]
    to_read = [[winner_first(pairs[row], True)[0] for _, row in micro]
               for parts in plan[done:] for micros in parts for micro in micros]
    batches = model.processor.batches(to_read, args.workers, limit=args.max_prompt)

    def roll_out(micro: list[tuple[int, int]], batch: Batch, step: int) -> tuple[Rollout, list[dict]]:
        """Let the policy think about the videos of some pairs (place in the step, row in the file), reward
        what it wrote. One record a rollout for the log."""
        rows = [pairs[row] for _, row in micro]
        with torch.no_grad():
            encoded = model.encode(batch)
        seeds = [draw_seed(args.seed, step, place, side) for place, _ in micro for side in (0, 1)]
        thoughts = model.think(encoded, G, args.max_new_tokens, args.temperature, args.top_p, seeds)
        cut = model.truncated(thoughts)
        gold = [scores for pair in rows for scores in (
            (pair.scores_b, pair.scores_a) if pair.preference == "B" else (pair.scores_a, pair.scores_b))]
        records = []
        for b, reference in enumerate(gold):
            for g in range(G):
                length = int(thoughts.mask[b, g].sum())
                text = model.processor.decode(thoughts.tokens[b, g, :length])
                parts = {
                    "format": format_reward(text),
                    "quality": quality_reward(text, reference),
                    "length": length_reward(length, args.length_low, args.length_high, args.length_excess)}
                total = sum(getattr(args, f"w_{name}") * value for name, value in parts.items())
                records.append({"reward": total, **{f"reward_{name}": value for name, value in parts.items()},
                                "cot_tokens": length, "truncated": float(cut[b, g]),
                                # −log π of what was sampled: an unbiased estimate of the entropy
                                "entropy": -thoughts.logps[b, g].sum().item() / length})
        rewards = torch.tensor([record["reward"] for record in records], device=model.device).view(-1, G)
        ref_logps = model.reference_logps(encoded, thoughts.tokens, thoughts.mask) if args.beta else None
        preferred = torch.tensor([pair.preference != "tie" for pair in rows], device=model.device)
        advantages = group_advantages(rewards)
        spread = (rewards.amax(1) - rewards.amin(1)).repeat_interleave(G)
        for record, advantage, signal, width in zip(records, advantages.flatten(),
                                                    (advantages != 0).any(1).repeat_interleave(G), spread):
            record |= {"advantage_spread": advantage.abs().item(), "reward_range": width.item(),
                       "no_signal": float(not signal)}
        # The features of a rollout batch's videos would fill a GPU: they wait on the CPU. Where the tower
        # trains they are not kept, for the update needs their gradients.
        batch = batch if model.tower_trains else encoded.to("cpu")
        tokens, mask, old_logps, *_ = thoughts
        return Rollout(batch, tokens, mask, old_logps, ref_logps, advantages, preferred), records

    if done == 0 and args.eval_before:
        test(0)
    model.train()
    progress = tqdm(range(done + 1, args.steps + 1), "rl", initial=done, total=args.steps,
                    disable=not ranks.first)
    for step in progress:
        started = time.time()
        ready = [[(micro, *next(batches)) for micro in micros] for micros in plan[step - 1]]
        skipped.add(ranks.gather_all([record for part in ready for _, _, _, bad in part for record in bad]))
        with model.gathered():
            rolled = [[roll_out([micro[i] for i in kept], batch, step)
                       for micro, batch, kept, _ in part if kept] for part in ready]
        records = [record for part in rolled for _, some in part for record in some]
        thought = time.time()
        figures = dict.fromkeys(("loss", "bt_loss", "bt_accuracy", "clip_fraction", "kl", "grad_norm",
                                 "left_out"), 0.0)
        for part in [[rollout for rollout, _ in part] for part in rolled]:
            videos, decided = ranks.sum([sum(len(r.tokens) for r in part),
                                         sum(int(r.preferred.sum()) for r in part)])
            turns = ranks.most(len(part)) if args.shard else 0  # all ranks gather a sharded model, or none
            for r in part:
                logps, scores = model.group(r.batch, r.tokens, r.mask)
                loss, found = grpo_loss(logps, r.old_logps, r.ref_logps, r.advantages, r.mask, args.clip_low,
                                        args.clip_high, args.beta)
                share = len(r.tokens) / videos
                loss = loss * share
                r_w, r_l = scores.view(-1, 2, G).unbind(1)  # (pairs, G)
                r_w, r_l = r_w[r.preferred], r_l[r.preferred]
                if len(r_w):
                    bt, bt_share = bt_loss(r_w, r_l), len(r_w) / decided
                    loss = loss + args.bt_weight * bt * bt_share
                    figures["bt_loss"] += bt.item() * bt_share / len(rolled)
                    figures["bt_accuracy"] += (r_w > r_l).float().mean().item() * bt_share / len(rolled)
                loss.backward()
                figures["loss"] += loss.item() / len(rolled)
                for name, value in found.items():
                    figures[name] += value * share / len(rolled)
            for _ in range(turns - len(part)):
                model.idle(with_logps=True)
            norm = run.descend(args.max_grad_norm)
            figures["grad_norm"] += norm / ranks.world / len(rolled)
            figures["left_out"] += float(not math.isfinite(norm)) / ranks.world
        sums = ranks.sum([float(len(records)),
                          *(sum(record[name] for record in records) for name in RECORDED)])
        figures = dict(zip(figures, ranks.sum(list(figures.values()))))
        figures |= {name: total / max(sums[0], 1) for name, total in zip(RECORDED, sums[1:])}
        run.log({"step": step, **figures, "seconds_thinking": thought - started,
                 "seconds": time.time() - started})
        progress.set_postfix(R=f"{figures['reward']:.3f}", R_q=f"{figures['reward_quality']:.3f}",
                             kl=f"{figures['kl']:.4f}", bt=f"{figures['bt_loss']:.3f}")
        if args.eval_every and step % args.eval_every == 0 and step < args.steps:
            test(step)
        if run.step_done(step, args.steps):
            return ranks.stop()
    figures = test(args.steps)
    scale = {key.split("/")[1]: value for key, value in figures.items() if "/score_" in key}
    model.save(run.out / "model", ranks.first, stage="rl", args=asdict(args), **scale)
    if ranks.first:
        print(json.dumps(figures, indent=1))
        print(f"{run.out}: done")
    ranks.stop()


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
