"""The other ways to make a reward model of the same backbone: what DeScore is compared with.

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
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import coldstart
import rl
from data import implied_overall, per_video
from model import OWN, DeScore
from support.batches import draw_seed
from support.command import Factor, Share, run_command
from support.run import MicroBatch, Run
from support.settings import setting

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
# Discriminative


@dataclass
class TiesArgs(coldstart.Args):
    theta: Factor = setting(5.0, "θ: how far apart scores are before a tie is unlikely")


def score_run(Args: type, shown=("loss", "accuracy")) -> tuple:
    """A run of stage 1 up to its loop: run, model, optimiser, and the groups' rates."""
    run = Run(Args, "coldstart", shown)
    args = run.args
    torch.manual_seed(args.seed)
    model = DeScore.load(args.model, video=args.video, quant=args.quant, reader=args.reader)
    model.processor.use_instruction(args.instruction)
    model.set_trainable(args.lora_rank, args.train_merger, args.train_vision)
    own = [name for name in model.trainable() if name.startswith(OWN)]
    rest = [name for name in model.trainable() if name not in own]
    head_lr = args.lr if args.head_lr is None else args.head_lr
    groups = [{"params": own, "lr": head_lr}, {"params": rest, "lr": args.lr}]
    optimizer = run.prepare(model, groups, args.weight_decay)
    return run, model, optimizer, [group["lr"] for group in groups]


def warm_up(run: Run, optimizer, rates: list[float], step: int, last: int) -> None:
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate * min(1.0, step / max(1, round(run.args.warmup * last)))


def ties() -> None:
    """Discriminative, by Bradley-Terry with ties: p is 1 whatever is given."""
    run, model, optimizer, rates = score_run(TiesArgs)
    run.args.mask_p = 1.0
    plan = coldstart.make_plan(run.args, run.read_train("cot", "CoTs"), run)
    for step, (micro_batches,) in run.steps(plan):
        warm_up(run, optimizer, rates, step, len(plan))
        (count,) = run.sum(sum(micro.weight.sum() for micro in micro_batches))
        for micro in micro_batches:
            r_w, r_l = model.score(micro.batch, per_video(micro.pairs, "cot")).view(-1, 2).unbind(1)
            is_tie = torch.tensor([pair.preference == "tie" for pair in micro.pairs])
            losses = ties_loss(r_w - r_l, is_tie.to(r_w.device), run.args.theta)
            loss = (losses * micro.weight).sum() / count
            loss.backward()
            run.means.total(micro.weight, loss=loss)
            run.means.add(micro.weight * ~is_tie, accuracy=(r_w > r_l).float())
        run.descend(run.args.max_grad_norm)


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
    run, model, optimizer, rates = score_run(SuperviseArgs, shown=("loss",))
    run.args.mask_p, dimensions = 0.0, model.processor.dimensions
    plan = coldstart.make_plan(run.args, run.read_train("cot", "CoTs", ties=False), run)
    for step, (micro_batches,) in run.steps(plan):
        warm_up(run, optimizer, rates, step, len(plan))
        written, counts = [], torch.zeros(2)
        for micro in micro_batches:
            cots = per_video(micro.pairs, "cot")
            tokens, mask = with_end(model, [to_write(cot, dimensions, run.args.think) for cot in cots])
            thought = torch.tensor([len(model.processor.encode(cot)) * run.args.think for cot in cots])
            in_cot = torch.arange(mask.shape[1]) < thought[:, None]
            parts = torch.stack([mask & in_cot, mask & ~in_cot]).to(micro.weight.device)  # (2, B, C)
            parts = parts * micro.weight.repeat_interleave(2)[:, None]
            written.append((micro, tokens[:, None], mask[:, None], parts))
            counts = counts + parts.sum((1, 2)).cpu()
        counts = torch.tensor(run.sum(*counts))
        for micro, tokens, mask, parts in written:
            logps, _ = model.group(micro.batch, tokens, mask)
            loss = -((logps[:, 0] * parts).sum((1, 2)) / counts.to(logps.device)).sum()
            loss.backward()
            run.means.total(micro.weight, loss=loss)
        run.descend(run.args.max_grad_norm)


@torch.no_grad()
def roll_out(run: Run, model: DeScore, micro: MicroBatch, step: int) -> tuple:
    """The rollouts of some pairs: encoded batch, tokens, mask, log-probabilities, advantages, rewards."""
    args, G = run.args, run.args.group_size
    batch = model.encode(micro.batch)
    seeds = []
    for place in micro.places:
        seeds += [draw_seed(args.seed, step, place, side) for side in (0, 1)]
    thoughts = model.think(batch, G, args.max_new_tokens, args.temperature, args.top_p, seeds)
    written = []
    for tokens, mask in zip(thoughts.tokens.flatten(0, 1), thoughts.mask.flatten(0, 1)):
        written.append(written_score(model.processor.decode(tokens[mask])))
    written = torch.tensor(written).view(-1, 2, G)
    rewards = pairwise_rewards(written)
    advantages = rl.group_advantages(rewards.flatten(0, 1).float().to(model.device))
    run.means.add(micro.weight[:, None, None].cpu(), reward=rewards, unread=written.isnan().float(),
                  cot_tokens=thoughts.mask.sum(-1).view(-1, 2, G).float())
    return batch, thoughts.tokens, thoughts.mask, thoughts.logps, advantages


def pairwise() -> None:
    """GRPO on the whole chain, by the pairwise reward alone; one update a rollout batch, no KL term."""
    run = Run(rl.Args, "rl", shown=("reward", "grpo_loss"))
    args = run.args
    torch.manual_seed(args.seed)
    model = DeScore.load(args.model, video=args.video)
    model.set_trainable(args.lora_rank)
    backbone = [name for name in model.trainable() if not name.startswith(OWN)]
    run.prepare(model, [{"params": backbone, "lr": args.lr}], args.weight_decay)
    plan = rl.make_plan(args, run.read_train("scores", "reference sub-scores", ties=False), run)
    for step, updates in run.steps(plan):
        for micro_batches in updates:
            rolled = [roll_out(run, model, micro, step) for micro in micro_batches]
            counts = [m.weight.sum().item() * 2 * args.group_size for m in micro_batches]
            (count,) = run.sum(sum(counts))
            for micro, (batch, tokens, mask, old_logps, advantages) in zip(micro_batches, rolled):
                learnt = mask & (micro.weight.repeat_interleave(2) > 0)[:, None, None]
                logps, _ = model.group(batch, tokens, mask, args.temperature)
                loss, figures = rl.grpo_loss(logps, old_logps, None, advantages, learnt, args.clip_low,
                                             args.clip_high, beta=0.0, count=count)
                loss.backward()
                run.means.total(micro.weight, grpo_loss=loss)
                run.means.add(learnt.sum(), **figures)
            run.descend(args.max_grad_norm)


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
    WAYS = {way.__name__: way for way in (ties, supervise, pairwise)}
    if len(sys.argv) < 2 or sys.argv[1] not in WAYS:
        sys.exit(f"usage: python experiments/paradigms.py {{{','.join(WAYS)}}} ...")
    run_command(WAYS[sys.argv.pop(1)])
