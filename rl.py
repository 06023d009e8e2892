"""Stage 2: dual-objective reinforcement learning. GRPO trains the thinking, Bradley-Terry keeps
the score calibrated.

    python rl.py    # the embedded default, after coldstart.py
    torchrun --nproc_per_node 8 rl.py --model runs/coldstart --train train.jsonl --test test.jsonl

For each video of a pair, G rollouts of the policy are rewarded and compared within their group;
the same rollouts, each followed by [Reward], are scored, and one forward and one backward serve
both losses:

    A_i     = (R_i − mean(R)) / std(R)                       R = w_f R_f + w_q R_q + w_l R_l
    L_GRPO  = −E 1/G Σ_i 1/|o_i| Σ_k [ min(ρ A_i, clip(ρ, 1−ε, 1+ε) A_i) − β D_KL ]
    L       = L_GRPO + λ L_BT

There is no critic, no learned reward and, with LoRA, no second copy of the model. π_old's
log-probabilities are those recorded while sampling; π_ref is this model with the adapter that
stage 1 left.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from coldstart import bt_loss, order
from data import (
    DIMENSIONS,
    TAGS,
    DataError,
    Pair,
    Processor,
    agreement,
    follows_format,
    keys_of,
    parse_cot,
    per_video,
)
from model import DeScore, Thoughts
from support.batches import chunks, draw_seed, plan_step, prompt_lengths
from support.command import (
    Count,
    Factor,
    Heat,
    NotNegative,
    Number,
    Positive,
    Share,
    TopP,
    Whole,
    run_command,
)
from support.formats import read_pairs
from support.means import Means
from support.optimize import adamw, all_reduce, clip
from support.ranks import Ranks
from support.run import MicroBatch, Run, check_said, due, finite, prepare, progress, read_tests, show
from support.settings import RunArgs, import_function, load_function, parse_args, setting
from support.shard import gathered


@dataclass
class Args(RunArgs):
    """Stage 2 (DeScore, Section "Stage 2"). Not the paper's: LoRA instead of the whole model,
    and the learning rate that goes with it; batch and updates are the released script's."""

    model: str = setting("runs/coldstart", "the model of stage 1", aliases=["--backbone"])
    out: str = setting("runs/rl", "the run's folder")
    steps: Count = setting(65, "rollout batches")
    batch_size: Count = setting(128, "pairs a rollout batch, over all ranks")
    updates: Count = setting(32, "optimiser steps a rollout batch")
    group_size: Count = setting(8, "G: rollouts a video")
    temperature: Heat = setting(1.0, "of the sampling")
    top_p: TopP = setting(1.0, "of the sampling")
    rollouts: str | None = setting(None, "FILE:FUNCTION that thinks in place of DeScore.think")
    w_format: Number = setting(0.1, "w_f")
    w_quality: Number = setting(0.7, "w_q")
    w_length: Number = setting(0.2, "w_l")
    length_low: Whole = setting(500, "tokens of a CoT up to which R_l is 0")
    length_high: Count = setting(2000, "tokens from which R_l is 1")
    length_excess: Count | None = setting(None, "from here R_l falls back to 0 [never]")
    reward: list[str] = setting([], "FILE:FUNCTION=WEIGHT: one more reward, or one for ours [none]",
                                metadata={"action": "extend"})
    advantage_std: bool = setting(True, "divide advantages by the group's std")
    loss_mean: Literal["cot", "token", "constant"] = setting("cot", "what L_GRPO is a mean over")
    clip_low: Share = setting(0.2, "ε below 1")
    clip_high: NotNegative = setting(0.2, "ε above 1")
    dual_clip: Factor | None = setting(None, "bound on ρ where A < 0 [off]")
    log_ratio_bound: Positive | None = setting(None, "log ρ, and that of D_KL, stay within ± this [off]")
    kl_bound: Positive | None = setting(None, "D_KL of a token is at most this [off]")
    mask_truncated: bool = setting(False, "leave cut-off rollouts out of L_GRPO")
    beta: NotNegative = setting(1e-5, "β of the KL term; 0 spares the reference's forward")
    bt_weight: NotNegative = setting(0.005, "λ: weight of the Bradley-Terry loss")
    bt_pairs: Literal["matched", "all"] = setting("matched", "rollouts that it compares")
    lr: NotNegative = setting(1e-5, "constant (1e-6 in the paper, for the whole model)")
    weight_decay: NotNegative = setting(0.01, "AdamW")
    max_grad_norm: Positive = setting(1.0, "gradients are clipped to it")
    lora_rank: Whole = setting(64, "adapters, as in stage 1; 0: the whole model")
    train_merger: bool = setting(False, "train the mergers too; π_ref shares them")
    max_pixels: Count = setting(307_200, "pixels a frame, at most")
    max_prompt: Whole = setting(6200, "longest prompt in tokens; 0: any")
    max_tokens: Count = setting(16_384, "tokens in a forward; a row at least")
    save_every: Whole = setting(5, "steps between checkpoints; 0: at the end only")

    def __post_init__(self):
        super().__post_init__()
        length_reward(0, self.length_low, self.length_high, self.length_excess)
        if self.rollouts:
            thinker(self.rollouts)  # to be missed at once


# ------------------------------
# Rewards of a rollout, each in [0, 1] (Section "Stage 2")


def format_reward(text: str, dimensions=DIMENSIONS, tags=TAGS) -> float:
    """R_f = 1 if the format is kept exactly (`data.follows_format`), else 0."""
    return float(follows_format(text, dimensions, tags))


def quality_reward(text: str, gold: dict, dimensions=DIMENSIONS, tags=TAGS) -> float:
    """R_q = matching sub-scores / reference sub-scores; "N/A" must match too. 0 if no scores
    can be read."""
    cot = parse_cot(text, dimensions, tags)
    return agreement(cot["dimensional_scores"], gold) if cot else 0.0


def length_reward(n_tokens: int, low: int = 500, high: int = 2000,
                  excess: int | None = None) -> float:
    """R_l = 0 up to `low` tokens of a CoT, linear to 1 at `high`; from `excess` on, where set,
    it falls back to 0 with the same slope, for a CoT can be too long as well. Raises
    ValueError unless low < high ≤ excess."""
    end = high if excess is None else excess
    if not low < high <= end:
        raise ValueError(f"R_l needs low < high ≤ excess, not {low}, {high}, {excess}")
    rise = (n_tokens - low) / (high - low)
    fall = 1.0
    if excess is not None:
        fall = 1.0 - (n_tokens - excess) / (high - low)
    return max(0.0, min(1.0, rise, fall))


class Reward(NamedTuple):
    """A part of R."""

    weight: float
    function: Callable[[str, int, dict], float]  # of a rollout's text, its token count, the reference
    source: str  # FILE:FUNCTION, for those who look at the run


def make_rewards(args: Args, processor) -> dict[str, Reward]:
    """The parts of R = w_f R_f + w_q R_q + w_l R_l by name: the paper's, and those of `--reward`."""
    dimensions = processor.dimensions
    tags = processor.tags

    def of_format(text: str, n_tokens: int, gold: dict) -> float:
        return format_reward(text, dimensions, tags)

    def of_quality(text: str, n_tokens: int, gold: dict) -> float:
        return quality_reward(text, gold, dimensions, tags)

    def of_length(text: str, n_tokens: int, gold: dict) -> float:
        return length_reward(n_tokens, args.length_low, args.length_high, args.length_excess)

    rewards = {
        "format": Reward(args.w_format, of_format, "rl.py:format_reward"),
        "quality": Reward(args.w_quality, of_quality, "rl.py:quality_reward"),
        "length": Reward(args.w_length, of_length, "rl.py:length_reward"),
    }
    asked_names = set()
    for asked in args.reward:
        where, name, weight, function = load_function(asked, processor=processor, args=args)
        name = name.removesuffix("_reward")
        if name in asked_names:
            raise DataError(f"--reward {asked}: another has this name")
        asked_names.add(name)
        # It replaces one of ours that has its name, and without =WEIGHT keeps that one's.
        if weight is None and name not in rewards:
            raise DataError(f"--reward {asked}: has no =WEIGHT, and is none of {', '.join(rewards)}")
        weight = rewards[name].weight if weight is None else weight
        rewards[name] = Reward(weight, function, where)
    return rewards


# ------------------------------
# Advantages and loss


def group_advantages(rewards: Tensor, divide_by_std: bool = True) -> Tensor:
    """A_i = (R_i − mean(R_1..G)) / std(R_1..G), rewards and advantages (B, G); std divides by
    G − 1. Without the division: Dr. GRPO (arXiv 2503.20783).

    A group whose rewards are all equal, or that has one element, carries no signal: its
    advantages are 0."""
    highest = rewards.amax(1, keepdim=True)  # (B, 1)
    lowest = rewards.amin(1, keepdim=True)
    spread = highest - lowest
    # Equal but for rounding counts as equal.
    largest = rewards.abs().amax(1, keepdim=True)
    has_signal = spread > 1e-6 * largest
    mean = rewards.mean(1, keepdim=True)
    std = torch.ones_like(spread)
    if divide_by_std and rewards.shape[1] > 1:
        std = rewards.std(1, keepdim=True)
    advantages = (rewards - mean) / std
    return torch.where(has_signal, advantages, 0.0)


def grpo_loss(
        logps: Tensor, old_logps: Tensor, ref_logps: Tensor | None,
        advantages: Tensor, mask: Tensor, clip_low: float = 0.2,
        clip_high: float = 0.2, beta: float = 1e-5, loss_mean: str = "cot",
        dual_clip: float | None = None, log_ratio_bound: float | None = None,
        kl_bound: float | None = None,
        count: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """L_GRPO = −E 1/G Σ_i 1/|o_i| Σ_k [ min(ρ A_i, clip(ρ, 1−ε, 1+ε) A_i) − β D_KL ]

    logps (with gradient), old_logps, ref_logps and mask (B, G, C), advantages (B, G);
    ref_logps may be None if β is 0. `loss_mean` "cot" is the equation; "token" is a mean over
    tokens (DAPO, arXiv 2503.14476; the released code), "constant" one over a constant number
    of them (Dr. GRPO). `count` is what the sum is divided by, by default the number of CoTs or
    tokens. `dual_clip` bounds ρ where A < 0 (arXiv 1912.09729). As in the released
    code, `log_ratio_bound` holds log ρ and log(π_ref/π_θ) within ± itself, `kl_bound` D_KL. An
    empty CoT contributes 0. Returns the scalar, and detached figures, means over tokens."""
    log_ratio = bounded((logps - old_logps) * mask, log_ratio_bound)
    ratio = log_ratio.exp()  # ρ (B, G, C)
    A = advantages[..., None]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * A, clipped * A)
    if dual_clip:
        floor = torch.maximum(objective, dual_clip * A)
        objective = torch.where(A < 0, floor, objective)
    kl = torch.zeros_like(ratio)
    if beta:
        to_ref = bounded((ref_logps - logps) * mask, log_ratio_bound)
        kl = to_ref.exp() - to_ref - 1  # D_KL = π_ref/π_θ − log(π_ref/π_θ) − 1, ≥ 0
        kl = bounded(kl, kl_bound)
    terms = (objective - beta * kl) * mask
    lengths = mask.sum(-1, keepdim=True)
    if loss_mean == "cot":
        terms = terms / lengths.clamp(min=1)  # 1/|o_i| Σ_k
    if count is None:
        counts = {"cot": lengths.numel(), "token": lengths.sum(), "constant": mask.numel()}
        count = counts[loss_mean]
    with torch.no_grad():
        tokens = lengths.sum().clamp(min=1)
        is_clipped = (clipped * A < ratio * A) & mask
        figures = {
            "clip_fraction": is_clipped.sum() / tokens,
            "kl": (kl * mask).sum() / tokens,
        }
    return -terms.sum() / count, figures


def bounded(values: Tensor, bound: float | None) -> Tensor:
    """Values held within ± a bound, beyond which they have no gradient; as they are without one."""
    return values if bound is None else values.clamp(-bound, bound)


# ------------------------------
# Rollouts


@dataclass
class Rollouts:
    """G rollouts of each of a micro-batch's B videos, and all that the update needs of them."""

    micro: MicroBatch  # its videos are encoded, unless the tower trains
    tokens: Tensor  # (B, G, C)
    mask: Tensor  # (B, G, C)
    learnt: Tensor  # (B, G, C) the tokens that L_GRPO is over
    old_logps: Tensor  # (B, G, C) of π_old, recorded while sampling
    ref_logps: Tensor | None  # (B, G, C) of π_ref
    decided: Tensor  # (pairs, 1) 1, or 0 for a tie, and for what counts for nothing
    texts: list[str]  # B · G
    truncated: Tensor  # (B, G) bool
    scores: Tensor  # (B, G)
    rewards: dict[str, Tensor]  # "reward", which is R, and its parts, each (B, G)
    sampler_gap: Tensor | None  # (B, G), see `Thoughts`
    advantages: Tensor | None = None  # (B, G), which main makes of the rewards of all ranks

    def figures(self) -> dict[str, Tensor]:
        """What is logged of each rollout, by name, (B, G) or (B, 1)."""
        R = self.rewards["reward"]
        highest = R.amax(1, keepdim=True)
        lowest = R.amin(1, keepdim=True)
        lengths = self.mask.sum(-1)
        gap = {} if self.sampler_gap is None else {"sampler_gap": self.sampler_gap}
        return {
            **self.rewards, **gap, "cot_tokens": lengths, "truncated": self.truncated,
            # −log π of what was sampled: an unbiased estimate of the entropy
            "entropy": -self.old_logps.sum(-1) / lengths,
            "advantage_spread": self.advantages.abs(),
            "reward_range": highest - lowest,
            "no_signal": (self.advantages == 0).all(1, keepdim=True),
        }

    def written(self, b: int) -> list[dict]:
        """The G rollouts of video b for a reader: each CoT with its rewards, advantage and score."""
        figures = {**self.rewards, "advantage": self.advantages, "score": self.scores}
        G = self.mask.shape[1]
        first = b * G
        records = []
        for g, cot in enumerate(self.texts[first : first + G]):
            values = {name: value[b, g].item() for name, value in figures.items()}
            records.append({"cot": cot, **finite(values)})
        return records


@cache
def thinker(asked: str) -> Callable[..., Thoughts]:
    """The function of one's own that thinks about a batch: called as `DeScore.think` is."""
    return import_function(asked, asked)


@torch.no_grad()
def roll_out(args: Args, model: DeScore, rewards: dict, micro: MicroBatch, step: int) -> Rollouts:
    """Let the policy think about the videos of a micro-batch, and reward what it wrote."""
    encoded = model.encode(micro.batch)
    # What is drawn for a video depends on its place alone, not on ranks and micro-batches.
    seeds = [draw_seed(args.seed, step, *row) for row in micro.rows]
    think = model.think
    batch = encoded
    if args.rollouts:  # it may want to see the videos themselves
        think = partial(thinker(args.rollouts), model)
        batch = replace(encoded, patches=micro.batch.patches)
    thoughts = think(
        batch, args.group_size, args.max_new_tokens, args.temperature, args.top_p, seeds)
    tokens = thoughts.tokens
    mask = thoughts.mask
    truncated = model.truncated(thoughts)
    texts = []
    for ids, in_cot in zip(tokens.flatten(0, 1), mask.flatten(0, 1)):
        text = model.processor.decode(ids[in_cot])
        texts.append(text)
    gold = per_video(micro.items, "scores")
    R, parts = reward_all(rewards, texts, mask.sum(-1), gold)
    ref_logps = None
    if args.beta:
        ref_logps = model.reference_logps(encoded, tokens, mask, args.temperature)

    is_counted = micro.row_weight > 0  # (B,)
    learnt = mask & is_counted[:, None, None]
    if args.mask_truncated:
        learnt = learnt & ~truncated[..., None]
    decided = torch.tensor([pair.preference != "tie" for pair in micro.items])
    decided = decided.to(micro.weight) * micro.weight
    # The features of a rollout batch's videos would fill a GPU: they wait on the CPU. Where
    # the tower trains they are not kept, for the update needs their gradients.
    if not model.tower_trains:
        micro = micro._replace(batch=encoded.to("cpu"))
    return Rollouts(
        micro, tokens, mask, learnt, thoughts.logps, ref_logps, decided[:, None], texts, truncated,
        thoughts.scores, {"reward": R, **parts}, thoughts.sampler_gap)


def reward_all(
        rewards: dict[str, Reward], texts: list[str], lengths: Tensor,
        gold: list[dict]) -> tuple[Tensor, dict[str, Tensor]]:
    """R = Σ w R_part of B groups' rollouts (B, G), and the parts by the names under which they
    are logged, in float64 on the CPU. texts: B · G; lengths (B, G) in tokens; gold: B
    references."""
    G = lengths.shape[1]
    token_counts = lengths.flatten().tolist()
    parts = {}
    total = torch.zeros(lengths.shape, dtype=torch.double)
    for name, reward in rewards.items():
        values = []
        for i, (text, n_tokens) in enumerate(zip(texts, token_counts)):
            reference = dict(gold[i // G])  # a copy: it is others' too
            value = reward.function(text, n_tokens, reference)
            values.append(float(value))
        if not all(abs(value) < 1e30 for value in values):  # NaN is not, nor what overflows
            raise DataError(f"the reward {name!r} gave {values}")
        part = torch.tensor(values, dtype=torch.double).view(lengths.shape)
        total += reward.weight * part
        parts[f"reward_{name}"] = part
    return total, parts


def rewards_of_all(rolled: list[Rollouts], ranks: Ranks) -> tuple[list[tuple[int, int]], Tensor]:
    """R of all videos of a rollout batch, on all ranks, (videos, G), in the order of the batch, and
    which row each is (`MicroBatch.rows`). Pairs of weight 0 are left out: repeats that keep a rank in
    step with the others, and what cannot be read."""
    groups = []
    for o in rolled:
        weights = o.micro.row_weight.tolist()
        rewards = o.rewards["reward"].tolist()
        for row, weight, of_group in zip(o.micro.rows, weights, rewards):
            if weight:
                groups.append((row, of_group))
    groups = sorted(ranks.gather(groups))
    rows = [row for row, _ in groups]
    R = torch.tensor([of_group for _, of_group in groups])  # float32
    G = rolled[0].mask.shape[1]
    return rows, R.reshape(len(rows), G)


def hand_out(A: Tensor, rows: list[tuple[int, int]], rolled: list[Rollouts]) -> None:
    """Give the rollouts of each row its advantages, A (rows, G); 0 to those that have none."""
    by_row = dict(zip(rows, A))
    nothing = torch.zeros(A.shape[1])
    for o in rolled:
        advantages = [by_row.get(row, nothing) for row in o.micro.rows]
        o.advantages = torch.stack(advantages).to(o.mask.device)


def records_of(rolled: list[Rollouts], count: int, step: int, ranks: Ranks) -> list[dict]:
    """What rollouts.jsonl keeps of a step: the rollouts of the batch's first `count` videos."""
    records = []
    for o in rolled:
        items = o.micro.items
        keys = keys_of(items)
        references = per_video(items, "scores")
        sides = len(keys) // len(items)
        for b, (place, side) in enumerate(o.micro.rows):
            number = place * sides + side
            if number >= count or not o.micro.row_weight[b]:
                continue
            video, prompt = keys[b]
            record = {"step": step, "video": video, "prompt": prompt}
            record["reference"] = references[b]
            record["rollouts"] = o.written(b)
            records.append((number, record))
    records = sorted(ranks.gather(records), key=lambda numbered: numbered[0])
    return [record for _, record in records]


# ------------------------------
# The run


def divisors(args: Args, rolled: list[Rollouts], ranks: Ranks) -> tuple[float, float]:
    """What an update's two losses are means of, over all ranks: CoTs, or tokens, in L_GRPO, and
    decided pairs in L_BT. At least 1: losses divide by them."""
    cots = 0.0
    tokens = 0.0
    decided = 0.0
    for o in rolled:
        cots += o.learnt.any(-1).sum().item()
        tokens += o.learnt.sum().item()
        decided += o.decided.sum().item()
    terms = {"cot": cots, "token": tokens, "constant": cots * args.max_new_tokens}
    count, decided = ranks.sum([terms[args.loss_mean], decided])
    return max(1.0, count), max(1.0, decided)


def ratio_figures(logps: Tensor, o: Rollouts) -> dict[str, Tensor]:
    """The largest ρ = π_θ / π_old of the learnt tokens, and how far apart the two log-probabilities
    are at most; both say what rounding does while π_θ is still the policy that sampled."""
    log_ratio = logps.detach() - o.old_logps
    log_ratio = log_ratio[o.learnt].double()
    largest = log_ratio.max()
    return {"ratio_max": largest.exp(), "logp_gap": log_ratio.abs().max()}


def make_plan(args: Args, pairs: list[Pair], processor: Processor, ranks: Ranks) -> list:
    """Which pairs each update of each rollout batch takes, in this rank's micro-batches of like
    length that may fill the cache of their thoughts (`plan_step`)."""
    plan = []
    lengths = prompt_lengths(processor, keys_of(pairs), ranks)
    cot_tokens = args.group_size * args.max_new_tokens  # of a video, at most
    wanted = args.steps * args.batch_size
    epochs = math.ceil(wanted / len(pairs))
    sequence = order(len(pairs), epochs, args.seed)
    batches = chunks(sequence, args.batch_size)
    for rows in batches[: args.steps]:
        batch = [pairs[row] for row in rows]
        sizes = []
        for pair in batch:
            prompts = [lengths[key] for key in pair.videos()]
            sizes.append(len(prompts) * (max(prompts) + cot_tokens))
        plan.append(plan_step(batch, sizes, args.think_tokens, ranks, args.updates))
    return plan


def main() -> None:
    ranks = Ranks.start()  # those that torchrun started, or this process alone
    args = parse_args(Args, "rl")
    run = Run(args, "rl", ranks)
    torch.manual_seed(args.seed)

    # What trains, and π_ref: the policy as stage 1 left it.
    model = DeScore.load(
        args.model, video=args.video, quant=args.quant,
        reader=args.reader, layout="ours")
    model.processor.use_instruction(args.instruction)
    if not model.has_head:
        run.say("warning: [Reward] and head begin untrained, without stage 1")
    model.set_trainable(args.lora_rank, args.train_merger)
    if args.beta:
        model.keep_reference()
    prepare(model, args, ranks)
    trainable = model.trainable()
    parameters = list(trainable.values())
    groups = [{"params": parameters, "lr": args.lr}]
    optimizer = adamw(groups, args.weight_decay, args.optim)

    # What it learns from: a tie is thought about too, but L_BT has no term for it.
    pairs = read_pairs(args.train, args.label, args.root, model.processor.dimensions)
    tests = read_tests(args, model.processor.dimensions)
    run.train_on(pairs)  # the file as it is: its rows count for --max-skipped, and for a resume
    ties = sum(pair.preference == "tie" for pair in pairs)
    run.say(f"{pairs.summary()}; {ties} of them ties, which have no winner")
    check_said(args.train, pairs, "scores", "reference sub-scores (scores_a, scores_b)")
    pairs = [pair.winner_first() for pair in pairs]
    rewards = make_rewards(args, model.processor)
    reward_weights = {reward.source: reward.weight for reward in rewards.values()}
    sum_of_parts = " + ".join(f"{weight:g} · {source}" for source, weight in reward_weights.items())
    run.say(f"R = {sum_of_parts}")
    plan = make_plan(args, pairs, model.processor, ranks)
    last = len(plan)
    grpo = partial(
        grpo_loss, clip_low=args.clip_low, clip_high=args.clip_high, beta=args.beta,
        loss_mean=args.loss_mean, dual_clip=args.dual_clip,
        log_ratio_bound=args.log_ratio_bound, kl_bound=args.kl_bound)
    G = args.group_size
    λ = args.bt_weight

    done = run.resume(model, optimizer)  # steps of an earlier start; what `save` is to keep
    run.write_settings(model, last, reward=reward_weights)
    videos = run.read_ahead(plan[done:], model)
    if done == 0 and args.eval_before:
        figures = run.evaluate(0, model, tests)
        run.save_if_best(0, model, figures)
    model.train()
    step = done
    bar = progress("rl", done, last, ranks)
    for step in bar:
        started = time.time()
        means = Means()
        updates = run.read(plan[step - 1], videos, model)

        # Think: π_old is the policy as it is now, for all updates of the step; `DeScore.think`
        # records its log-probabilities while it samples.
        thinking = time.time()
        rolled = []
        with gathered(model):
            for micro_batches in updates:
                rolled.append([roll_out(args, model, rewards, micro, step) for micro in micro_batches])
        rollouts = list(chain.from_iterable(rolled))

        # R has the groups of the whole batch, on all ranks; A_i compares within each group.
        rows, R = rewards_of_all(rollouts, ranks)  # (videos, G)
        A = group_advantages(R, args.advantage_std)  # (videos, G)
        hand_out(A, rows, rollouts)
        for o in rollouts:
            weight = o.micro.row_weight[:, None].expand(-1, G)  # each rollout has its video's
            means.add(weight, **o.figures())
        means.add(seconds_thinking=time.time() - thinking)

        # Learn: each update takes its part of the batch.
        for update, of_update in enumerate(rolled):
            count, decided = divisors(args, of_update, ranks)
            for o in of_update:
                batch = o.micro.batch
                logps, scores = model.group(batch, o.tokens, o.mask, args.temperature)
                L_GRPO, figures = grpo(
                    logps, o.old_logps, o.ref_logps, o.advantages, o.learnt, count=count)
                r_w, r_l = scores.view(-1, 2, G).unbind(1)  # (pairs, G) of the winner, of the loser
                if args.bt_pairs == "all":  # each of one with each of the other: (pairs, G²)
                    r_w = r_w.repeat_interleave(G, 1)
                    r_l = r_l.repeat(1, G)
                bt_terms = decided * r_w.shape[1]
                L_BT = bt_loss(r_w, r_l, bt_terms, o.decided)
                L = L_GRPO + λ * L_BT
                L.backward()

                learns = o.learnt.any()
                if update == 0 and learns:  # π_θ is still π_old
                    means.largest(**ratio_figures(logps, o))
                means.total(learns, update, grpo_loss=L_GRPO)
                means.total(o.decided, update, bt_loss=L_BT)
                means.total(learns | o.decided.any(), update, loss=L)
                means.add(o.learnt.sum(), **figures)
                right = (r_w > r_l).float()
                means.add(o.decided, bt_accuracy=right.mean(1, keepdim=True))

            all_reduce(parameters, ranks)  # a sum: each loss divides by the count over all ranks
            norm = clip(parameters, args.max_grad_norm)
            if 0 < norm < math.inf:  # 0: nothing counted, and AdamW would move the weights all the same
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.check_gradient(norm)
            means.add(grad_norm=norm, left_out=not math.isfinite(norm))

        figures = means.over(ranks)
        run.log({"step": step, **figures, "seconds": time.time() - started})
        run.warn_of_ratio(step, figures, model.dtype)
        example = rollouts[-1].texts[0]
        run.warn_of_format(figures, min(2, last), example)
        for record in records_of(rollouts, args.keep_rollouts, step, ranks):
            run.log(record, "rollouts")
        show(bar, figures, "reward", "reward_quality", "kl", "bt_loss")
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
