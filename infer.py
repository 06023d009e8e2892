"""Think about videos, score them, rank them, and measure how well the scores agree with people.

    python infer.py video.mp4 "a red circle moves left"           # the CoT, its sub-scores, r
    python infer.py a.mp4 b.mp4 c.mp4 "a red circle moves left"   # best first
    python infer.py --pairs test.jsonl --out predictions.jsonl    # accuracy against people
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import tee
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import (
    TAGS,
    Batch,
    Key,
    Pair,
    agreement,
    follows_format,
    implied_overall,
    keys_of,
    parse_cot,
    per_video,
)
from model import DeScore, Thoughts, check_sampling
from support import tables
from support.above import from_above
from support.batches import (
    THINK_TOKENS,
    deal_to_all,
    draw_seed,
    prompt_lengths,
    read_ahead,
    split_unreadable,
)
from support.command import (
    READER,
    Count,
    Positive,
    Temperature,
    Whole,
    add_think_at,
    not_empty,
    run_command,
)
from support.files import LAYOUTS, MODELS, default_model
from support.formats import findings, read_pairs
from support.ranks import ALONE, Ranks
from support.shard import gathered

# Why the score behind a CoT does not count, or None: of the text, and whether it was cut off.
Unfit = Callable[[str, bool], str | None]


@dataclass(frozen=True)
class Thinking:
    """How a model thinks about the videos that it judges."""

    max_new_tokens: int = 4096
    """tokens of the longest CoT"""
    temperature: float = 0.0
    """of the sampling; 0: the likeliest token"""
    samples: int = 1
    """CoTs per video; their scores are averaged"""
    seed: int = 0
    """of the sampling at a temperature above 0"""
    think_tokens: int = THINK_TOKENS
    """tokens in memory at a time, of prompts and the longest CoTs that they may get"""
    repetition_penalty: float | None = None
    """at temperature 0; above 1, tokens of the prompt and the CoT become less likely. None: the
    model's own"""


def one_record(thinking: Thinking | None, fields: dict) -> Thinking:
    """The record that a call gives as `thinking`, or that its fields, given by name, make. Raises
    TypeError for both at once, and for anything else."""
    if thinking is None:
        return Thinking(**fields)
    if fields or not isinstance(thinking, Thinking):
        raise TypeError(f"{thinking!r}, {fields}: give one Thinking, or its fields by name")
    return thinking


def judge(
        model: DeScore, keys: list[Key], thinking: Thinking | None = None, *,
        done: Collection[Key] = (), think=True, without_cot=False, workers=0, finite=True,
        ranks: Ranks = ALONE, numbers: list[int] | None = None,
        unfit: Unfit | None = None, **fields) -> Iterator[dict]:
    """Think about many (video, prompt) keys and score them, except those that are `done`. thinking: a
    record, or in its place its fields by name, such as samples=4.

    Keys of like length go through the model together, the longest first, as many as fill
    thinking.think_tokens with the CoTs that they may get. `ranks` share the work (`hand_out`), and
    each of them gets all records. What is sampled for a key depends on its number alone, by default
    its place in `keys`. `workers` are processes that decode videos ahead.

    Yields one dict per key: video, prompt, cot, truncated, score. With more samples than one,
    score is the mean over them, score_std their spread, and cot the first. `without_cot` adds
    score_no_cot; without `think` that alone is there. For an unreadable video: video, prompt,
    error. `unfit` says of a CoT, and whether it was cut off, why its score does not count, or None;
    a video then has `usable`, how many CoTs count, and an error where none does. Raises DataError
    for a score that is not finite, unless `finite` is False."""
    thinking = one_record(thinking, fields)
    if finite:
        model.check_head()
    numbered = list(zip(numbers or range(len(keys)), keys))
    lengths = prompt_lengths(model.processor, keys, ranks)
    longest_cots = thinking.samples * thinking.max_new_tokens if think else 0
    sizes = [lengths[key] + longest_cots for _, key in numbered]
    groups = []
    to_read = []
    for group in deal_to_all(numbered, sizes, thinking.think_tokens, ranks.world):
        # A group with one key to do is judged whole: in other company rounding would differ.
        if any(key not in done for _, key in group):
            groups.append(group)
            to_read.append([[key] for _, key in group])

    if ranks.world > 1:  # each worker takes two groups ahead: no more than are this rank's share
        workers = min(workers, len(groups) // (2 * ranks.world))

    def judged(places: Iterator[int]) -> Iterator[list[dict]]:
        places, to_come = tee(places)
        batches = read_ahead(model.processor, to_read, workers, order=to_come)
        for place, (batch, errors) in zip(places, batches):
            records = judge_batch(model, groups[place], batch, errors, thinking, think,
                                  without_cot or not think, unfit)
            if finite:
                tables.check_scores(model, records)
            yield [record for key, record in by_key(records).items() if key not in done]

    return ranks.hand_out(len(groups), judged)


@torch.no_grad()
def judge_batch(
        model: DeScore, group: list[tuple[int, Key]], batch: Batch, errors: list[str | None],
        thinking: Thinking, think: bool, without_cot: bool,
        unfit: Unfit | None = None) -> list[dict]:
    """`judge` for the numbered keys of one batch, and what is wrong with each, or None."""
    rows, unread = split_unreadable(group, errors)
    if not rows:
        return unread
    batch = model.encode(batch).select(rows)
    seeds = []
    records = []
    for row in rows:
        number, (video, prompt) = group[row]
        seeds.append(draw_seed(thinking.seed, number))
        records.append({"video": video, "prompt": prompt})
    no_cot = None
    if think:
        # Another function may stand for `think`, and need not know a penalty.
        penalty = {}
        if thinking.repetition_penalty is not None:
            penalty["repetition_penalty"] = thinking.repetition_penalty
        thoughts = model.think(batch, thinking.samples, thinking.max_new_tokens,
                               thinking.temperature, seeds=seeds, without_cot=without_cot,
                               **penalty)
        no_cot = thoughts.scores_no_cot
        truncated = model.truncated(thoughts).tolist()  # (B, n)
        for i, record in enumerate(records):
            record |= record_thoughts(model, thoughts, i, truncated[i], unfit)
    if without_cot:
        if no_cot is None:
            no_cot = model.score(batch, [None] * len(records))
        for record, score in zip(records, no_cot.tolist()):
            record["score_no_cot"] = score
    return records + unread


def record_thoughts(
        model: DeScore, thoughts: Thoughts, i: int, truncated: list[bool],
        unfit: Unfit | None = None) -> dict:
    """What a record has of video i's n CoTs, of which some were `truncated`: the score, and the
    first CoT. With `unfit`, of those that count alone, and how many these are, `usable`; an error
    where there are none."""
    if thoughts.errors and thoughts.errors[i]:
        return {"error": thoughts.errors[i]}
    cots = [model.processor.decode(tokens[mask])
            for tokens, mask in zip(thoughts.tokens[i], thoughts.mask[i])]
    counted = list(range(len(cots)))
    record = {}
    if unfit:
        reasons = [unfit(cot, cut_off) for cot, cut_off in zip(cots, truncated)]
        counted = [place for place, reason in enumerate(reasons) if reason is None]
        record["usable"] = len(counted)
        if not counted:
            return record | {"cot": cots[0], "truncated": truncated[0], "error": reasons[0]}
    first = counted[0]
    record["cot"] = cots[first]
    record["truncated"] = truncated[first]
    scores = thoughts.scores[i, counted]  # (n',)
    # What was chosen among numbers that ran over is no thought.
    if not thoughts.logps[i, counted].isfinite().all():
        scores = torch.full_like(scores, torch.nan)
    record["score"] = scores.mean().item()
    if len(counted) > 1:
        record["score_std"] = scores.std().item()
    # A head of one's own may say more than one number.
    if thoughts.parts is not None and thoughts.parts.shape[-1] > 1:
        parts = thoughts.parts[i, counted].mean(0)  # (K,)
        for place, part in enumerate(parts.tolist(), 1):
            record[f"part_{place}"] = part
    return record


# ------------------------------
# How well scores agree with people


def accuracy_without_ties(human: Tensor, margin: Tensor) -> float:
    """Share of decided pairs whose sign the margin has; a margin of 0 is wrong.

    human (N,): +1 (A preferred), −1 (B), 0 (tie); margin (N,): r_A − r_B. NaN where every
    pair is a tie."""
    human = torch.as_tensor(human)
    margin = torch.as_tensor(margin)
    right = torch.sign(margin) == human
    return right[human != 0].double().mean().item()


def accuracy_with_ties(human: Tensor, margin: Tensor) -> float:
    """The best accuracy over thresholds ε, |margin| ≤ ε counting as "tie" (arXiv 2305.14324).

    human and margin (N,) as above; ε < 0, no tie at all, is among the thresholds. O(n log n)."""
    human = torch.as_tensor(human)
    margin = torch.as_tensor(margin)
    size, index = margin.abs().sort()
    human = human[index]
    margin = margin[index]
    as_tie = (human == 0).long()
    as_sign = ((torch.sign(margin) == human) & (human != 0)).long()
    # How many are right with the k smallest margins called ties and the rest by sign; k must
    # not split equal margins.
    gained = torch.cat([as_tie.new_zeros(1), (as_tie - as_sign).cumsum(0)])
    right = as_sign.sum() + gained
    allowed = torch.ones(len(human) + 1, dtype=torch.bool)
    allowed[1:-1] = size[1:] != size[:-1]
    best = right[allowed].max().item()
    return best / len(human) if len(human) else float("nan")


Judged = dict[Key, dict]  # a record for each (video, prompt) key


def margins(pairs: list[Pair], judged: Judged, field: str) -> Tensor | None:
    """r_A − r_B of each pair in float64; None where the field was not judged."""
    if not all(field in record for record in judged.values()):
        return None
    differences = []
    for pair in pairs:
        a, b = (judged[key][field] for key in pair.videos())
        differences.append(a - b)
    return torch.tensor(differences, dtype=torch.double)


def accuracy_reading(pairs: list[Pair], judged: Judged, dimensions: dict, tags=TAGS) -> float:
    """The accuracy of somebody who reads the CoTs and sees no score: the share of decided pairs in
    which the preferred video's CoT says the better (`implied_overall`). A pair counts half where
    both say the same or one cannot be read."""
    right = []
    for pair in pairs:
        a, b = (implied_overall(judged[key]["cot"], dimensions, tags) for key in pair.videos())
        read = 0 if None in (a, b) else (a > b) - (a < b)
        if pair.human:
            right.append((1 + read * pair.human) / 2)
    return statistics.fmean(right) if right else float("nan")


ACCURACIES = {"accuracy": accuracy_without_ties, "accuracy_ties": accuracy_with_ties}


def fields_of(judged: Judged) -> dict[str, str]:
    """The numbers that a record has of its video, each with the suffix of its figures' names: the
    scores, and what a model's own head or `think` adds (`tables.further`)."""
    first = next(iter(judged.values()), {})
    own = {name: f"_{name}" for name in tables.further(first)}
    return {"score": "", "score_no_cot": "_no_cot"} | own


def measure(pairs: list[Pair], judged: Judged, dimensions: dict, tags=TAGS) -> dict[str, float]:
    """Figures over pairs from the judgement of each (video, prompt) key; a figure stands only
    where it has a base: accuracies where there are labels, quality (the mean R_q) where there
    are reference sub-scores; format_rate is the share of CoTs for which R_f is 1. Pairs with a
    video that could not be read are left out; where there are any, `unreadable` counts them."""
    pairs, judged, figures = tables.readable(pairs, judged)
    if not pairs:
        return figures
    human = torch.tensor([pair.human for pair in pairs])
    for field, suffix in fields_of(judged).items():
        margin = margins(pairs, judged, field)
        if margin is not None:
            for name, accuracy in ACCURACIES.items():
                figures[name + suffix] = accuracy(human, margin)
    if not all("cot" in record for record in judged.values()):
        return figures
    figures["accuracy_reading"] = accuracy_reading(pairs, judged, dimensions, tags)
    # A video that stands in several pairs counts once.
    references = dict(zip(keys_of(pairs), per_video(pairs, "scores")))
    qualities = []
    for key, gold in references.items():
        if gold:
            cot = parse_cot(judged[key]["cot"], dimensions, tags)
            qualities.append(agreement(cot["dimensional_scores"], gold) if cot else 0.0)
    if qualities:
        figures["quality"] = statistics.fmean(qualities)
    records = judged.values()
    kept = [follows_format(record["cot"], dimensions, tags) for record in records]
    figures["format_rate"] = statistics.fmean(kept)
    figures["truncated"] = statistics.fmean(record["truncated"] for record in records)
    scores = [record["score"] for record in records]
    figures["score_mean"] = statistics.fmean(scores)
    figures["score_std"] = statistics.pstdev(scores)
    return figures


def evaluate(
        model: DeScore, tests: dict[str, list[Pair]], ranks: Ranks, thinking: Thinking,
        workers: int = 0, judged_by_set: dict[str, Judged] | None = None) -> dict[str, float]:
    """Measure a model on test sets by name: figures by "name/figure". Every video of a set is
    judged once, with a CoT and without one, the work split over ranks. `judged_by_set` gets the
    judgements of each set."""
    figures = {}
    for name, pairs in tests.items():
        keys = list(dict.fromkeys(keys_of(pairs)))
        with gathered(model):
            records = judge(model, keys, thinking, without_cot=True, workers=workers,
                            ranks=ranks)
            judged = by_key(tqdm(records, f"evaluate {name}", len(keys), leave=False,
                                 disable=not ranks.first))
        tables.list_unreadable(judged if ranks.first else {})
        if judged_by_set is not None:
            judged_by_set[name] = judged
        measured = measure(pairs, judged, model.processor.dimensions, model.processor.tags)
        figures |= {f"{name}/{key}": value for key, value in measured.items()}
    return figures


def by_key(records: Iterable[dict]) -> Judged:
    return {(record["video"], record["prompt"]): record for record in records}


# ------------------------------
# The command


def report(pairs: list[Pair], judged: Judged, dimensions: dict, tags=TAGS) -> dict:
    """`measure`, with an interval for each accuracy and a row for each two generators."""
    figures = measure(pairs, judged, dimensions, tags)
    pairs, judged, _ = tables.readable(pairs, judged)
    by_suffix = {}
    for field, suffix in fields_of(judged).items():
        by_suffix[suffix] = margins(pairs, judged, field)
    figures = {"pairs": len(pairs), **figures}
    return figures | tables.intervals(pairs, by_suffix, ACCURACIES)


def judge_all(
        model: DeScore, keys: list[Key], thinking: Thinking, args: argparse.Namespace,
        ranks: Ranks) -> Judged:
    """Judge each key once. With --out, judgements are appended to a file; a run that was cut
    off goes on there."""
    journal = None
    if args.out and ranks.first:
        journal = from_above("tools.journal", "open_journal")(args.out, model, args, keys)
    before = list(journal.records.values()) if journal else []
    judged = by_key(ranks.gather(before))
    new = judge(model, keys, thinking, done={*judged}, think=args.cot == "on",
                without_cot=bool(args.pairs), workers=args.workers, ranks=ranks)
    for record in tqdm(new, "judge", len(keys), initial=len(judged), unit="video",
                       disable=not ranks.first or len(keys) < 2):
        judged |= by_key([record])
        if journal:
            journal.add(record)
    return judged


# The flags of a `Thinking`, by field, where a command says nothing else.
FLAGS = {
    "samples": {"type": Count, "default": 1, "help": "CoTs a video, their scores averaged"},
    "max_new_tokens": {"type": Count, "default": 4096, "help": "longest CoT"},
    "temperature": {"type": Temperature, "help": "0: the likeliest token [0; with --samples 1]"},
    "repetition_penalty": {"type": Positive, "help": "at temperature 0: above 1, what the prompt "
                           "or the CoT holds becomes less likely [1; 1.05 in the release's "
                           "layout]"},
    "seed": {"type": Whole, "default": 0, "help": "of the sampling at a temperature above 0"},
    "think_tokens": {"type": Count, "default": THINK_TOKENS,
                     "help": "tokens thought at a time, of prompts and their longest CoTs"},
}


def add_thinking(parser: argparse.ArgumentParser, **changes: dict | None) -> None:
    """Add the flags of a `Thinking` to a command. `changes` has, by field, what add_argument
    gets in place of FLAGS, other names of the flag under "also", or None for no such flag."""
    for name, options in FLAGS.items():
        change = changes.get(name, {})
        if change is not None:
            options = options | change
            also = options.pop("also", [])
            parser.add_argument("--" + name.replace("_", "-"), *also, **options)


def read_thinking(args: argparse.Namespace) -> Thinking:
    """The record of what a command line says. Where it gives no temperature, args gets 0, or 1
    with more samples than one. DataError for one that is too low, and a penalty
    that does not go with it."""
    if args.temperature is None:
        args.temperature = 0.0 if args.samples == 1 else 1.0
    thinking = Thinking(**{name: getattr(args, name) for name in FLAGS if name in args})
    check_sampling(thinking.temperature, 1.0, thinking.repetition_penalty or 1.0)
    return thinking


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="VIDEO … PROMPT", help="videos, then their prompt")
    add("--model", type=not_empty, help=f"a saved model or a run's folder [{MODELS}, else without "
        "--pairs the embedded toy's]")
    add("--pairs", help="a pair file of any known format to evaluate on instead")
    add("--label", help="with --pairs: the preference's column [TA, else Overall]")
    add("--root", help="with --pairs: the folder that its paths are relative to [its own]")
    add("--out", type=Path, help="with --pairs: a file for the judgements, a line a video")
    add("--predictions", nargs="+", metavar="FILE", help="with --pairs: others' scores, measured in the "
        "same way; with --model compared with ours")
    add("--cot", choices=("on", "off"), default="on", help="off: score without thinking")
    add("--instruction", help="a file with <video> and <prompt> in it [the model's own]; "
        "problem: the pair file's column")
    add("--scoring-layout", choices=LAYOUTS, help="release: as the authors score "
        "[the model's own]")
    add_thinking(parser, think_tokens={"also": ["--max-tokens"]})
    add_think_at(parser)
    add("--workers", type=Whole, default=0, help="processes that decode videos ahead")
    add("--reader", **READER)
    add("--json", action="store_true", help="print JSON instead of text")
    add("--report", metavar="PAGE.html", help="write a page to look at as well")
    args = parser.parse_args()
    if args.inputs and os.path.isfile(args.inputs[-1]):
        parser.error(f"{args.inputs[-1]} is a file; the prompt comes last, and is missing")
    if bool(args.pairs) == bool(args.inputs) or len(args.inputs) == 1:
        parser.error("give videos and their prompt, or --pairs FILE")
    if args.report:
        try:
            args.report = from_above("tools.report", "page_path")(args.report, args.pairs, args.out)
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --report: {error}")
    if (args.out or args.predictions) and not args.pairs:
        parser.error("--out keeps the judgements of --pairs, --predictions has others'")
    thinks_there = args.think_at or args.think_at_model
    if args.predictions and not args.model and (args.out or args.report or thinks_there):
        parser.error("with --predictions alone nothing is judged: --out, --report and --think-at "
                     "need --model")
    args.thinking = read_thinking(args)
    return args


def main() -> None:
    args = parse_args()
    if args.predictions and not args.model:
        return from_above("tools.predictions", "measure_alone")(args)
    ranks = Ranks.start() if args.pairs else ALONE  # of a few videos one process makes a ranking
    args.model = args.model or default_model(or_toy=not args.pairs)
    model = DeScore.load(args.model, reader=args.reader, layout=args.scoring_layout)
    model.processor.use_instruction(args.instruction)
    if args.think_at or args.think_at_model:
        from_above("tools.think_at", "think_at")(model, args)
    dimensions = model.processor.dimensions
    pairs = None
    others = None
    if args.pairs:
        column = "problem" if args.instruction == "problem" else "prompt"
        pairs = read_pairs(args.pairs, args.label, args.root, dimensions, column)
        keys = keys_of(pairs)
        ranks.agree(vars(args), args.pairs, keys, model)
        if ranks.first:
            print(pairs.summary(), *findings(pairs), sep="\n", file=sys.stderr)
        if args.predictions:  # what is wrong with them is said before anything is judged
            read = from_above("tools.predictions", "Others")
            others = ranks.ask_first(lambda: read(args, pairs))
    else:
        *videos, prompt = args.inputs
        keys = [(video, prompt) for video in videos]
    keys = list(dict.fromkeys(keys))
    judged = judge_all(model, keys, args.thinking, args, ranks)
    ranks.stop()
    if not ranks.first:
        return
    code = tables.list_unreadable(judged)
    if args.pairs:
        answer = report(pairs, judged, dimensions, model.processor.tags)
        text = tables.show_report(answer)
        if others:
            answer |= others.measure(args.model, judged)
            text += "\n" + others.show(answer)
            code |= others.code
    else:
        answer = tables.ranking(model, judged)
        text = tables.show_ranking(answer)
    if args.report:
        write_page = from_above("tools.report", "write_page")
        write_page(args.report, model, judged, pairs, answer, args.workers)
    print(tables.as_json(answer) if args.json else text)
    sys.exit(code)


def __getattr__(name: str):
    """`from infer import reward, Scorer`, which stand in tools/memory.py."""
    if name in ("reward", "Scorer"):
        return from_above("tools.memory", name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    run_command(main)
