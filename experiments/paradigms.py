"""The other ways to make a reward model of the same backbone: what DeScore is compared with.

    python experiments/paradigms.py expected --train F --model toy/backbone ...     as coldstart.py, no coin
    python experiments/paradigms.py ties --train F --model toy/backbone ...         as coldstart.py, with ties
    python experiments/paradigms.py supervise --train F --model toy/backbone ...  writes the score (--think)
    python experiments/paradigms.py pairwise --train F --model RUN ...              the same, by GRPO

A **discriminative** model (VideoAlign's way) is stage 1 with p = 1: no CoT, a score from [Reward]. `ties`
gives it the Bradley-Terry model with ties, and so the pairs that are ties.

A **generative** model writes its score, from 10 to 50, in words that the backbone knows ("so 34"):
`supervise` teaches it to, by cross-entropy, behind the CoT that it is given (the **coupled** way of
UnifiedReward-Thinking and VideoScore2) or, with --think false, alone. `pairwise` then trains the whole chain
by GRPO, with one reward: how many of the other video's rollouts it beats, as the label wants it.

All of them are the loops of coldstart.py and rl.py with another loss or reward, and take their flags.
"""

import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import coldstart
import rl
from data import DataError, Pair, implied_overall, per_video
from model import OWN, DeScore
from support.batches import draw_seed
from support.command import Factor, Share, run_command
from support.formats import read_pairs
from support.means import Means
from support.optimize import adamw, all_reduce, clip
from support.ranks import Ranks
from support.run import MicroBatch, Run, check_said, prepare, read_tests
from support.settings import parse_args, setting

WRITTEN = re.compile(r" so ([1-5][0-9])\s*")


# ------------------------------
# Losses and rewards


def ties_loss(d: Tensor, is_tie: Tensor, theta: float) -> Tensor:
    """−log P of the labels under the Bradley-Terry model with ties (Rao and Kupper, 1967), each of N pairs:

        P(w ≻ l) = e^r_w / (e^r_w + θ e^r_l)
        P(tie)   = (θ² − 1) e^r_w e^r_l / ((e^r_w + θ e^r_l) (θ e^r_w + e^r_l))

    d (N,) = r_w − r_l, of a tie either way round; is_tie (N,) bool; θ > 1."""
    log_theta = torch.tensor(theta).log()
    win, lose = F.softplus(log_theta - d), F.softplus(log_theta + d)
    return torch.where(is_tie, win + lose - torch.tensor(theta**2 - 1).log(), win)


def pairwise_rewards(written: Tensor) -> Tensor:
    """What each rollout earns that wrote a score: the share of the other video's rollouts that it beats, as
    the label wants it, a tie half. written (pairs, 2, G), the winner first, NaN where no score can be read:
    such a rollout earns nothing, and loses to each. Returns (pairs, 2, G) in [0, 1]."""
    w, l = written.unbind(1)
    w, l = w[:, :, None], l[:, None, :]
    beats = (w > l).double() + 0.5 * (w == l).double()
    w_reads, l_reads = ~w.isnan(), ~l.isnan()
    beats_w = torch.where(l_reads, beats, 1.0) * w_reads
    beats_l = torch.where(w_reads, beats, 1.0) * l_reads
    return torch.stack([beats_w.mean(2), beats_l.mean(1)], 1)


def written_score(text: str) -> float:
    """The score that a text ends with, 10 to 50; NaN where there is none."""
    found = WRITTEN.fullmatch(text, max(0, text.rfind(" so ")))
    return float(found[1]) if found and int(found[1]) <= 50 else float("nan")


# ------------------------------
# Beyond the paper: the expectation over the mask


def expected_loss(scores: Tensor, p: float, count: float, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(1 − p) L_BT with the CoTs + p L_BT without them, what stage 1's coin has as its mean. scores
    (pairs, 2, 2): of the winner and the loser, behind the CoT and without one; weight (pairs,). Returns
    the loss and each term's weight (pairs, 2)."""
    share = torch.tensor([1 - p, p], device=scores.device)
    weight = weight[:, None] * share
    r_w, r_l = scores.unbind(1)  # (pairs, 2)
    return coldstart.bt_loss(r_w, r_l, count, weight), weight


def cots_and_none(model: DeScore, cots: list[str]) -> tuple[Tensor, Tensor]:
    """Two CoTs of each of B videos as `DeScore.group` takes them: its own, and none. (B, 2, C)"""
    ids = [torch.tensor(model.processor.encode_cot(cot), dtype=torch.long) for cot in cots]
    lengths = torch.tensor([[len(i), 0] for i in ids])
    tokens = pad_sequence(ids, batch_first=True)[:, None].expand(-1, 2, -1)
    return tokens, torch.arange(tokens.shape[-1]) < lengths[..., None]


def expected() -> None:
    """Stage 1 without its coin: both scores of a video from one forward."""
    run, model = begin(coldstart.Args, "coldstart")
    args = run.args
    pairs = pairs_of(run, model, "cot", "CoTs", ties=False)
    plan = coldstart.make_plan(replace(args, mask_p=0.0), pairs, model.processor, run.ranks)

    def backward(step, micro_batches, means, update):
        (count,) = run.ranks.sum([sum(micro.weight.sum().item() for micro in micro_batches)])
        for micro in micro_batches:
            tokens, mask = cots_and_none(model, per_video(micro.items, "cot"))
            _, scores = model.group(micro.batch, tokens, mask)
            scores = scores.view(-1, 2, 2)
            loss, weight = expected_loss(scores, args.mask_p, max(1.0, count), micro.weight)
            loss.backward()
            r_w, r_l = scores.unbind(1)
            means.total(micro.weight, update, loss=loss)
            means.add(weight, accuracy=r_w > r_l, margin=r_w - r_l)

    train(run, model, two_groups(args, model), plan, backward)


# ------------------------------
# Discriminative


@dataclass
class TiesArgs(coldstart.Args):
    theta: Factor = setting(5.0, "θ: how far apart scores are before a tie is unlikely")


def begin(Args: type, stage: str) -> tuple[Run, DeScore]:
    """A run of a stage and its model, as main of the stage makes them."""
    run = Run(parse_args(Args, stage), stage, Ranks.start())
    args = run.args
    torch.manual_seed(args.seed)
    model = DeScore.load(args.model, video=args.video, quant=args.quant, reader=args.reader,
                         layout="ours")
    model.processor.use_instruction(args.instruction)
    model.set_trainable(args.lora_rank, args.train_merger, getattr(args, "train_vision", False))
    prepare(model, args, run.ranks)
    return run, model


def train(run: Run, model: DeScore, groups: list[dict], plan: list, backward: Callable) -> None:
    """The loop of the stages. `backward` (step, micro-batches, means, update) puts gradients in place for
    one update; the rate of each group of parameters rises over the first --warmup of the steps."""
    args = run.args
    ranks = run.ranks
    optimizer = adamw(groups, args.weight_decay, args.optim)
    trainable = [parameter for group in groups for parameter in group["params"]]
    rates = [group["lr"] for group in groups]
    tests = read_tests(args, model.processor.dimensions)
    last = len(plan)
    warmup = max(1, round(getattr(args, "warmup", 0) * last))
    done = run.resume(model, optimizer)
    run.write_settings(model, last)
    videos = run.read_ahead(plan[done:], model)
    if done == 0 and args.eval_before:
        figures = run.evaluate(0, model, tests)
        run.save_if_best(0, model, figures)
    model.train()
    for step in tqdm(range(done + 1, last + 1), run.stage, last, initial=done, disable=not ranks.first):
        started = time.time()
        means = Means()
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * min(1.0, step / warmup)
        for update, micro_batches in enumerate(run.read(plan[step - 1], videos, model)):
            backward(step, micro_batches, means, update)
            all_reduce(trainable, ranks)
            norm = clip(trainable, args.max_grad_norm)
            if 0 < norm < math.inf:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.check_gradient(norm)
            means.add(grad_norm=norm, left_out=float(not math.isfinite(norm)))
        run.log({"step": step, **means.over(ranks), "seconds": time.time() - started})
        if args.eval_every and step % args.eval_every == 0 and step < last:
            figures = run.evaluate(step, model, tests)
            run.save_if_best(step, model, figures)
        stop = run.asked_to_stop()
        if stop or step == last or (args.save_every and step % args.save_every == 0):
            run.save(step)
        if stop:
            return run.stopped(step, last)
    run.save_model(model)
    figures = run.evaluate(last, model, tests)
    run.save_if_best(last, model, figures)
    run.finish(figures)


def two_groups(args: coldstart.Args, model: DeScore) -> list[dict]:
    """[Reward] and head at their own rate, all else that trains at another, as in stage 1."""
    trainable = model.trainable()
    own = [p for name, p in trainable.items() if name.startswith(OWN)]
    rest = [p for name, p in trainable.items() if not name.startswith(OWN)]
    head_lr = args.lr if args.head_lr is None else args.head_lr
    return [{"params": own, "lr": head_lr}, {"params": rest, "lr": args.lr}]


def pairs_of(run: Run, model: DeScore, field: str, what: str, ties: bool) -> list[Pair]:
    """The pairs of --train that say `field`, the winner first, with ties or without."""
    args = run.args
    pairs = read_pairs(args.train, args.label, args.root, model.processor.dimensions)
    run.train_on(pairs)
    run.say(pairs.summary())
    pairs = [pair for pair in pairs if ties or pair.preference != "tie"]
    if not pairs:
        raise DataError(f"{args.train}: nothing but ties, from which nothing is learnt here")
    check_said(args.train, pairs, field, what)
    return [pair.winner_first() for pair in pairs]


def ties() -> None:
    """Discriminative, by Bradley-Terry with ties: p is 1 whatever is given."""
    run, model = begin(TiesArgs, "coldstart")
    run.args.mask_p = 1.0
    pairs = pairs_of(run, model, "cot", "CoTs", ties=True)
    plan = coldstart.make_plan(run.args, pairs, model.processor, run.ranks)

    def backward(step, micro_batches, means, update):
        (count,) = run.ranks.sum([sum(micro.weight.sum().item() for micro in micro_batches)])
        for micro in micro_batches:
            r_w, r_l = model.score(micro.batch, per_video(micro.items, "cot")).view(-1, 2).unbind(1)
            is_tie = torch.tensor([pair.preference == "tie" for pair in micro.items])
            losses = ties_loss(r_w - r_l, is_tie.to(r_w.device), run.args.theta)
            loss = (losses * micro.weight).sum() / max(1.0, count)
            loss.backward()
            means.total(micro.weight, update, loss=loss)
            means.add(micro.weight * ~is_tie, accuracy=(r_w > r_l).float())

    train(run, model, two_groups(run.args, model), plan, backward)


# ------------------------------
# Generative


@dataclass
class SuperviseArgs(coldstart.Args):
    think: bool = setting(True, "write the CoT before the score")
    mask_p: Share = setting(0.0, "not used")


def to_write(cot: str, dimensions: dict, think: bool) -> str:
    """What a generative model is to write of a video: its annotation and the overall score that this implies,
    or just that score."""
    score = f" so {round(10 * implied_overall(cot, dimensions))}"
    return cot + score if think else score


def with_end(model: DeScore, texts: list[str]) -> tuple[Tensor, Tensor]:
    """The tokens of texts and the end token behind each: tokens and mask (N, C)."""
    ids = [torch.tensor([*model.processor.encode(text), model.eos]) for text in texts]
    mask = pad_sequence([torch.ones_like(i, dtype=torch.bool) for i in ids], batch_first=True)
    return pad_sequence(ids, batch_first=True), mask


def supervise() -> None:
    """Cross-entropy: its mean over the tokens of the scores, and with CoTs its mean over theirs too. In one
    mean the few tokens of a score would hardly be learnt; without the CoTs these would be unlearnt."""
    run, model = begin(SuperviseArgs, "coldstart")
    run.args.mask_p = 0.0
    dimensions = model.processor.dimensions
    pairs = pairs_of(run, model, "cot", "CoTs", ties=False)
    plan = coldstart.make_plan(run.args, pairs, model.processor, run.ranks)

    def backward(step, micro_batches, means, update):
        written = []
        counts = torch.zeros(2)
        for micro in micro_batches:
            cots = per_video(micro.items, "cot")
            tokens, mask = with_end(model, [to_write(cot, dimensions, run.args.think) for cot in cots])
            thought = torch.tensor([len(model.processor.encode(cot)) * run.args.think for cot in cots])
            in_cot = torch.arange(mask.shape[1]) < thought[:, None]
            parts = torch.stack([mask & in_cot, mask & ~in_cot]).to(micro.weight.device)  # (2, B, C)
            parts = parts * micro.row_weight[:, None]
            written.append((micro, tokens[:, None], mask[:, None], parts))
            counts = counts + parts.sum((1, 2)).cpu()
        counts = torch.tensor(run.ranks.sum(counts.tolist())).clamp(min=1)
        for micro, tokens, mask, parts in written:
            logps, _ = model.group(micro.batch, tokens, mask)
            loss = -((logps[:, 0] * parts).sum((1, 2)) / counts.to(logps.device)).sum()
            loss.backward()
            means.total(micro.weight, update, loss=loss)

    train(run, model, two_groups(run.args, model), plan, backward)


@torch.no_grad()
def roll_out(args: rl.Args, model: DeScore, micro: MicroBatch, step: int, means: Means) -> tuple:
    """The rollouts of some pairs: encoded batch, tokens, mask, log-probabilities, advantages, rewards."""
    G = args.group_size
    batch = model.encode(micro.batch)
    seeds = [draw_seed(args.seed, step, *row) for row in micro.rows]
    thoughts = model.think(batch, G, args.max_new_tokens, args.temperature, args.top_p, seeds)
    written = []
    for tokens, mask in zip(thoughts.tokens.flatten(0, 1), thoughts.mask.flatten(0, 1)):
        written.append(written_score(model.processor.decode(tokens[mask])))
    written = torch.tensor(written).view(-1, 2, G)
    rewards = pairwise_rewards(written)
    advantages = rl.group_advantages(rewards.flatten(0, 1).float().to(model.device))
    means.add(micro.weight[:, None, None].cpu(), reward=rewards, unread=written.isnan().float(),
              cot_tokens=thoughts.mask.sum(-1).view(-1, 2, G).float())
    return batch, thoughts.tokens, thoughts.mask, thoughts.logps, advantages


def pairwise() -> None:
    """GRPO on the whole chain, by the pairwise reward alone; one update a rollout batch, no KL term."""
    run, model = begin(rl.Args, "rl")
    args = run.args
    backbone = [p for name, p in model.trainable().items() if not name.startswith(OWN)]
    pairs = pairs_of(run, model, "scores", "reference sub-scores", ties=False)
    plan = rl.make_plan(args, pairs, model.processor, run.ranks)

    def backward(step, micro_batches, means, update):
        rolled = [roll_out(args, model, micro, step, means) for micro in micro_batches]
        counts = [m.weight.sum().item() * 2 * args.group_size for m in micro_batches]
        (count,) = run.ranks.sum([sum(counts)])
        for micro, (batch, tokens, mask, old_logps, advantages) in zip(micro_batches, rolled):
            learnt = mask & (micro.row_weight > 0)[:, None, None]
            logps, _ = model.group(batch, tokens, mask, args.temperature)
            loss, figures = rl.grpo_loss(logps, old_logps, None, advantages, learnt, args.clip_low,
                                         args.clip_high, beta=0.0, count=max(1.0, count))
            loss.backward()
            means.total(micro.weight, update, grpo_loss=loss)
            means.add(learnt.sum(), **figures)

    train(run, model, [{"params": backbone, "lr": args.lr}], plan, backward)


@torch.no_grad()
def expected_scores(model: DeScore, batch, cots: list[str] | None = None) -> tuple[Tensor, Tensor]:
    """What a generative model says of B videos, behind the CoTs that it wrote or without any: the likeliest
    score, and the expectation over all that it could write, 10 to 50, both (B,). Their 41 texts stand behind
    one copy of what comes before."""
    values = torch.arange(10.0, 51.0)
    tokens, mask = with_end(model, [f" so {value}" for value in range(10, 51)])
    B = len(batch)
    if cots:
        batch = with_cots(model, batch, cots)
    logps, _ = model.group(batch, tokens.expand(B, -1, -1), mask.expand(B, -1, -1))
    odds = logps.sum(-1).softmax(1).cpu()  # (B, 41)
    return values[odds.argmax(1)], odds @ values


def with_cots(model: DeScore, batch, cots: list[str]):
    """A batch whose prompts go on with CoTs, up to the scores that these end with."""
    rows = []
    for ids, mask, cot in zip(batch.input_ids, batch.mask, cots):
        if not math.isnan(written_score(cot)):
            cot = cot[: cot.rfind(" so ")]
        rows.append(torch.cat([ids[mask], torch.tensor(model.processor.encode(cot), dtype=ids.dtype)]))
    masks = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    return replace(batch, input_ids=pad_sequence(rows, batch_first=True),
                   mask=pad_sequence(masks, batch_first=True))


if __name__ == "__main__":
    WAYS = {way.__name__: way for way in (expected, ties, supervise, pairwise)}
    if len(sys.argv) < 2 or sys.argv[1] not in WAYS:
        sys.exit(f"usage: python experiments/paradigms.py {{{','.join(WAYS)}}} ...")
    run_command(WAYS[sys.argv.pop(1)])
