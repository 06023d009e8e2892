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

What is not here: no critic, no learned reward, with LoRA no second copy of the model. π_old's
log-probabilities are those recorded while sampling; π_ref is this model with the adapter that
stage 1 left.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from coldstart import bt_loss, order
from data import (
    DIMENSIONS,
    TAGS,
    Batch,
    DataError,
    Pair,
    agreement,
    follows_format,
    keys_of,
    parse_cot,
    per_video,
)
from model import DeScore
from support.batches import chunks, draw_seed, prompt_lengths, split_evenly
from support.command import Count, Factor, NotNegative, Number, Positive, Share, TopP, Whole, run_command
from support.run import MicroBatch, Run, Unit
from support.settings import RunArgs, load_function, setting
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
    temperature: Positive = setting(1.0, "of the sampling")
    top_p: TopP = setting(1.0, "of the sampling")
    w_format: Number = setting(0.1, "w_f")
    w_quality: Number = setting(0.7, "w_q")
    w_length: Number = setting(0.2, "w_l")
    length_low: Whole = setting(500, "tokens of a CoT up to which R_l is 0")
    length_high: Count = setting(2000, "tokens from which R_l is 1")
    length_excess: Count | None = setting(None, "from here R_l falls back to 0 [never]")
    reward: list[str] = setting([], "FILE:FUNCTION=WEIGHT: one more reward, or one for ours [none]",
                                metadata={"action": "extend"})
    advantage_std: bool = setting(True, "divide advantages by the group's std")
    loss_mean: Literal["cot", "token", "constant"] = setting("cot", "of L_GRPO: see there")
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
    if not low < high <= (high if excess is None else excess):
        raise ValueError(f"R_l needs low < high ≤ excess, not {low}, {high}, {excess}")
    rise = (n_tokens - low) / (high - low)
    fall = 1.0 if excess is None else 1.0 - (n_tokens - excess) / (high - low)
    return max(0.0, min(1.0, rise, fall))


class Reward(NamedTuple):
    """A part of R, by what it is worth and how it is found."""

    weight: float
    function: Callable[[str, int, dict], float]  # of a rollout's text, its tokens, the reference
    source: str  # FILE:FUNCTION, for those who look at the run


def make_rewards(args: Args, processor) -> dict[str, Reward]:
    """The parts of R = w_f R_f + w_q R_q + w_l R_l by name: the paper's, and those of `--reward`."""
    form = processor.dimensions, processor.tags
    bounds = args.length_low, args.length_high, args.length_excess
    rewards = {
        "format": Reward(args.w_format, lambda text, n_tokens, gold: format_reward(text, *form),
                         "rl.py:format_reward"),
        "quality": Reward(args.w_quality,
                          lambda text, n_tokens, gold: quality_reward(text, gold, *form),
                          "rl.py:quality_reward"),
        "length": Reward(args.w_length, lambda text, n_tokens, gold: length_reward(n_tokens, *bounds),
                         "rl.py:length_reward"),
    }
    own_names = set()
    for asked in args.reward:
        where, name, weight, function = load_function(asked, processor=processor, args=args)
        name = name.removesuffix("_reward")
        if name in own_names:
            raise DataError(f"--reward {asked}: another has this name")
        own_names.add(name)
        # One of the same name as ours takes its place, and its weight where it brings none.
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
    spread = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True)
    # Equal but for rounding counts as equal.
    has_signal = spread > 1e-6 * rewards.abs().amax(1, keepdim=True)
    std = torch.ones_like(spread)
    if divide_by_std and rewards.shape[1] > 1:
        std = rewards.std(1, keepdim=True)
    return torch.where(has_signal, (rewards - rewards.mean(1, keepdim=True)) / std, 0.0)


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
    of them (Dr. GRPO). `count` is the number of CoTs or tokens that E is a mean of, where these
    are a part of them. `dual_clip` bounds ρ where A < 0 (arXiv 1912.09729). As in the released
    code, `log_ratio_bound` holds log ρ and log(π_ref/π_θ) within ± itself, `kl_bound` D_KL. An
    empty CoT contributes 0. Returns the scalar, and detached figures, means over tokens."""
    log_ratio = held((logps - old_logps) * mask, log_ratio_bound)
    ratio = log_ratio.exp()  # ρ (B, G, C)
    A = advantages[..., None]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * A, clipped * A)
    if dual_clip:
        objective = torch.where(A < 0, torch.maximum(objective, dual_clip * A), objective)
    kl = torch.zeros_like(ratio)
    if beta:
        to_ref = held((ref_logps - logps) * mask, log_ratio_bound)
        kl = to_ref.exp() - to_ref - 1  # D_KL = π_ref/π_θ − log(π_ref/π_θ) − 1, ≥ 0
        kl = held(kl, kl_bound)
    terms = (objective - beta * kl) * mask
    lengths = mask.sum(-1, keepdim=True)
    if loss_mean == "cot":
        terms = terms / lengths.clamp(min=1)  # 1/|o_i| Σ_k
    if count is None:
        of = {"cot": lengths.numel(), "token": lengths.sum(), "constant": mask.numel()}
        count = of[loss_mean]
    with torch.no_grad():
        tokens = lengths.sum().clamp(min=1)
        is_clipped = (clipped * A < ratio * A) & mask
        figures = {"clip_fraction": is_clipped.sum() / tokens, "kl": (kl * mask).sum() / tokens}
    return -terms.sum() / count, figures


def held(values: Tensor, bound: float | None) -> Tensor:
    """Values within ± a bound, beyond which they have no gradient; as they are where there is none."""
    return values if bound is None else values.clamp(-bound, bound)


# ------------------------------
# Rollouts


@dataclass
class Rollout:
    """Some pairs' rollouts and all that the update needs of them. B = 2 · pairs."""

    batch: Batch  # its videos encoded, unless the tower trains
    tokens: Tensor  # (B, G, C)
    mask: Tensor  # (B, G, C)
    learnt: Tensor  # (B, G, C) the tokens that L_GRPO is over
    old_logps: Tensor  # (B, G, C)
    ref_logps: Tensor | None  # (B, G, C)
    advantages: Tensor  # (B, G)
    decided: Tensor  # (B / 2, 1) 1, or 0 for a tie, which has no winner


@torch.no_grad()
def roll_out(run: Run, model: DeScore, rewards: dict, micro: MicroBatch, step: int) -> Rollout:
    """Let the policy think about the videos of some pairs, and reward what it wrote."""
    args, G = run.args, run.args.group_size
    encoded = model.encode(micro.batch)
    seeds = []
    for place in micro.places:
        seeds += [draw_seed(args.seed, step, place, side) for side in (0, 1)]
    thoughts = model.think(encoded, G, args.max_new_tokens, args.temperature, args.top_p, seeds)
    tokens, mask, old_logps, scores = thoughts[:4]
    lengths, truncated = mask.sum(-1), model.truncated(thoughts)
    texts = []
    for row, row_mask in zip(tokens.flatten(0, 1), mask.flatten(0, 1)):
        texts.append(model.processor.decode(row[row_mask]))
    R, parts = reward_all(rewards, texts, lengths, per_video(micro.pairs, "scores"))
    advantages = group_advantages(R.float().to(model.device), args.advantage_std)
    ref_logps = None
    if args.beta:
        ref_logps = model.reference_logps(encoded, tokens, mask, args.temperature)

    weight = micro.weight.repeat_interleave(2)[:, None]  # (B, 1)
    learnt = mask & (weight > 0)[..., None]
    if args.mask_truncated:
        learnt = learnt & ~truncated[..., None]
    spread = R.amax(1, keepdim=True) - R.amin(1, keepdim=True)
    run.means.add(
        weight.expand_as(R), reward=R, **parts, cot_tokens=lengths, truncated=truncated,
        # −log π of what was sampled: an unbiased estimate of the entropy
        entropy=-old_logps.sum(-1) / lengths, advantage_spread=advantages.abs(),
        reward_range=spread.expand_as(R),
        no_signal=(advantages == 0).all(1, keepdim=True).expand_as(R))
    run.keep_rollouts(step, micro, texts, {"reward": R, **parts, "advantage": advantages,
                                           "score": scores})
    decided = torch.tensor([pair.preference != "tie" for pair in micro.pairs])
    decided = decided.to(micro.weight) * micro.weight
    # The features of a rollout batch's videos would fill a GPU: they wait on the CPU. Where
    # the tower trains they are not kept, for the update needs their gradients.
    batch = micro.batch if model.tower_trains else encoded.to("cpu")
    return Rollout(batch, tokens, mask, learnt, old_logps, ref_logps, advantages,
                   decided[:, None])


def reward_all(
        rewards: dict[str, Reward], texts: list[str], lengths: Tensor,
        gold: list[dict]) -> tuple[Tensor, dict[str, Tensor]]:
    """R = Σ w R_part of B groups' rollouts (B, G), and the parts by the names under which they
    are logged, in float64 on the CPU. texts: B · G; lengths (B, G) in tokens; gold: B
    references."""
    parts, total = {}, torch.zeros(lengths.shape, dtype=torch.double)
    for name, reward in rewards.items():
        values = []
        for i, (text, n_tokens) in enumerate(zip(texts, lengths.flatten().tolist())):
            reference = dict(gold[i // lengths.shape[1]])  # a copy: it is others' too
            values.append(float(reward.function(text, n_tokens, reference)))
        if not all(abs(value) < 1e30 for value in values):  # NaN is not, nor what overflows
            raise DataError(f"the reward {name!r} gave {values}")
        part = torch.tensor(values, dtype=torch.double).view(lengths.shape)
        total += reward.weight * part
        parts[f"reward_{name}"] = part
    return total, parts


# ------------------------------
# The loop


def counts(run: Run, rollouts: list[Rollout]) -> list[float]:
    """What an update's two losses are means of, over all ranks: CoTs, or tokens, in L_GRPO,
    and decided pairs in L_BT."""
    args, cots, tokens, decided = run.args, 0, 0, 0
    for o in rollouts:
        cots += o.learnt.any(-1).sum()
        tokens += o.learnt.sum()
        decided += o.decided.sum()
    of = {"cot": cots, "token": tokens, "constant": cots * args.max_new_tokens}
    return run.sum(of[args.loss_mean], decided)


def make_plan(args: Args, pairs: list[Pair], run: Run) -> list:
    """Which pairs each update of each rollout batch takes, in micro-batches of like length
    that may fill the cache of their thoughts."""
    plan, lengths = [], prompt_lengths(run.model.processor, keys_of(pairs), run.ranks)
    epochs = -(-args.steps * args.batch_size // len(pairs))
    seen = order(len(pairs), epochs, args.seed)
    for rows in chunks(seen, args.batch_size)[: args.steps]:
        units, updates = [], []
        for place, row in enumerate(rows):
            units.append(Unit(pairs[row], place))
        for some in split_evenly(units, args.updates):
            sizes = []
            for unit in some:
                prompt = max(lengths[key] for key in unit.pair.videos())
                sizes.append(2 * (prompt + args.group_size * args.max_new_tokens))
            updates.append(run.deal(some, sizes, args.think_tokens))
        plan.append(updates)
    return plan


def main() -> None:
    run = Run(Args, "rl", shown=("reward", "reward_quality", "kl", "bt_loss"))
    args = run.args
    torch.manual_seed(args.seed)
    model = DeScore.load(args.model, video=args.video, quant=args.quant, reader=args.reader,
                         layout="ours")
    model.processor.use_instruction(args.instruction)
    if run.ranks.first and not model.has_head:
        print("warning: [Reward] and head begin untrained, without stage 1")
    model.set_trainable(args.lora_rank, args.train_merger)
    if args.beta:
        model.keep_reference()
    groups = [{"params": list(model.trainable()), "lr": args.lr}]
    run.prepare(model, groups, args.weight_decay)
    pairs = run.read_train("scores", "reference sub-scores (scores_a, scores_b)")
    rewards = make_rewards(args, model.processor)
    run.say_reward({reward.source: reward.weight for reward in rewards.values()})
    plan = make_plan(args, pairs, run)
    grpo = partial(grpo_loss, clip_low=args.clip_low, clip_high=args.clip_high, beta=args.beta,
                   loss_mean=args.loss_mean, dual_clip=args.dual_clip,
                   log_ratio_bound=args.log_ratio_bound, kl_bound=args.kl_bound)
    G, λ = args.group_size, args.bt_weight

    for step, updates in run.steps(plan):
        started = time.time()
        with gathered(model):
            rolled = []
            for micro_batches in updates:
                rolled.append([roll_out(run, model, rewards, m, step) for m in micro_batches])
        run.means.add(seconds_thinking=time.time() - started)
        for rollouts in rolled:
            count, decided = counts(run, rollouts)
            for o in rollouts:
                logps, scores = model.group(o.batch, o.tokens, o.mask, args.temperature)
                L_GRPO, figures = grpo(logps, o.old_logps, o.ref_logps, o.advantages, o.learnt,
                                       count=count)
                r_w, r_l = scores.view(-1, 2, G).unbind(1)  # (pairs, G)
                if args.bt_pairs == "all":  # each of one with each of the other: (pairs, G²)
                    r_w, r_l = r_w.repeat_interleave(G, 1), r_l.repeat(1, G)
                L_BT = bt_loss(r_w, r_l, decided * r_w.shape[1], o.decided)
                L = L_GRPO + λ * L_BT
                L.backward()
                run.check_ratio(logps, o.old_logps, o.learnt)
                run.means.total(o.learnt.any(), grpo_loss=L_GRPO)
                run.means.total(o.decided, bt_loss=L_BT)
                anything = o.learnt.any() | o.decided.any()
                run.means.total(anything, loss=L)
                run.means.add(o.learnt.sum(), **figures)
                run.means.add(o.decided, bt_accuracy=(r_w > r_l).float().mean(1, keepdim=True))
            run.descend(args.max_grad_norm)


if __name__ == "__main__":
    run_command(main)
