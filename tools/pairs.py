"""Preference pairs from scores, as DPO asks for them: each prompt's videos are judged, and of two the
better is preferred.

    python -m tools.pairs VIDEOS.jsonl OUT.jsonl --model runs/rl
    torchrun --nproc_per_node 8 -m tools.pairs VIDEOS.jsonl OUT.jsonl --samples 8

VIDEOS.jsonl has a prompt and its videos a line, paths relative to the file, and may say which
generators made them:

    {"prompt": "...", "videos": ["a.mp4", "b.mp4", "c.mp4"], "models": ["wan", "wan", "hunyuan"]}

OUT.jsonl is a pair file of our own format: video_a is the better one, with the CoTs, and beside them
score_a, score_b and the margin, (r_a − r_b) in standard deviations of the scores. Judgements are
appended to OUT.jsonl.judged as they come, and the same command goes on behind them; the file stays,
so that another --margin or --take needs no judging. A video that cannot be read is left out and
listed, and the exit code is 1.

With --samples K a score is the mean over K thoughts, and a pair says how sure it is: margin_se is the
margin over the standard error of the two means, √((s_a² + s_b²) / K), and p is P(r_a > r_b) for one
thought about each, by a normal approximation. s_a and s_b are themselves estimates from K thoughts.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import NormalDist

from data import TAGS, TEXT_LIMIT, DataError, Key, Pair, checked, json_records, read_text
from infer import add_thinking, judge_all, read_thinking
from model import DeScore
from support import tables
from support.command import READER, NotNegative, Whole, not_empty, run_command
from support.files import MODELS, default_model
from support.ranks import Ranks
from tools.forgiving import read_annotation
from tools.formats import check_out, write_pairs

SHOWN = 20  # how many of the least sure pairs are printed


@dataclass
class Group:
    """A prompt and the videos made for it."""

    prompt: str
    videos: list[str]  # resolved, two or more, none of them twice
    models: list[str | None]  # which generator made each

    def keys(self) -> list[Key]:
        return [(video, self.prompt) for video in self.videos]


@dataclass
class ScoredPair(Pair):
    """A pair that scores have made: A is the better."""

    score_a: float | None = None
    score_b: float | None = None
    margin: float | None = None  # r_A − r_B, in standard deviations of the scores
    # With more than one sample; margin_se is None where all thoughts about a video score alike.
    margin_se: float | None = None  # in standard errors of the difference of the means
    p: float | None = None  # P(r_A > r_B) of one thought each


# ------------------------------
# Prompts and their videos


def read_groups(path: Path) -> list[Group]:
    """Read prompts with their videos, a JSON object a line. Raises DataError, naming the file and
    the row, for anything that cannot be understood."""
    groups = []
    for row, record in json_records(read_text(path), path):
        groups.append(make_group(record, f"{path}, row {row}", path.parent))
    if not groups:
        raise DataError(f"{path}: no prompt with its videos is in it")
    return groups


def make_group(record: dict, where: str, root: Path) -> Group:
    """Check one record and resolve its paths. `where` names it in errors."""
    prompt, videos = record.get("prompt"), record.get("videos")
    if not is_name(prompt):
        raise DataError(f"{where}: 'prompt' is missing or not a text")
    if not isinstance(videos, list) or not all(map(is_name, videos)):
        raise DataError(f"{where}: 'videos' is missing or not a list of paths")
    models = record.get("models") or [None] * len(videos)
    if not isinstance(models, list) or not all(name is None or is_name(name) for name in models):
        raise DataError(f"{where}: 'models' is not a list of names")
    if len(models) != len(videos):
        raise DataError(f"{where}: {len(models)} models of {len(videos)} videos")
    for text in (prompt, *videos, *models):
        checked(text or "", where)
    resolved = [str(root / video) for video in videos]
    for video, times in Counter(resolved).items():
        if times > 1:
            raise DataError(f"{where}: {video} stands there {times} times")
    if len(resolved) < 2:
        raise DataError(f"{where}: {len(resolved)} videos; a pair needs two")
    return Group(prompt, resolved, models)


def is_name(value) -> bool:
    return isinstance(value, str) and value.strip() != ""


# ------------------------------
# Pairs


def make_pairs(group: Group, judged: dict[Key, dict], std: float, samples: int = 1,
               take: str = "best-worst") -> Iterator[ScoredPair]:
    """The pairs of a prompt's videos that could be read, the largest score first: the best against
    the worst, or each two of them (`take` all). std is what margins are measured in."""
    ranked = []
    for key, generator in zip(group.keys(), group.models):
        if "error" not in judged[key]:
            ranked.append((judged[key], generator))
    ranked.sort(key=lambda video: -video[0]["score"])
    if take == "best-worst":
        ranked = ranked[:1] + ranked[1:][-1:]
    for (a, model_a), (b, model_b) in combinations(ranked, 2):
        yield ScoredPair(
            group.prompt, a["video"], b["video"], "A", cot_a=a["cot"], cot_b=b["cot"],
            model_a=model_a, model_b=model_b, score_a=a["score"], score_b=b["score"],
            margin=(a["score"] - b["score"]) / (std or 1.0), **how_sure(a, b, samples))


def how_sure(a: dict, b: dict, samples: int) -> dict[str, float]:
    """How sure it is that a is better than b, from the means and standard deviations of their
    scores over so many samples; {} from one sample."""
    if samples == 1:
        return {}
    margin, spread = a["score"] - b["score"], math.hypot(a["score_std"], b["score_std"])
    if not spread:
        return {"p": 0.5 * (1 + (margin > 0) - (margin < 0))}
    return {"margin_se": margin / spread * math.sqrt(samples),
            "p": NormalDist().cdf(margin / spread)}


def use_of(pair: ScoredPair, margin: float, scores: bool, dimensions: dict,
           tags: tuple[str, str] = TAGS) -> str:
    """"kept", or why the pair is left out. With `scores` it gets those of its CoTs."""
    if not pair.margin > margin:
        return "not above the margin"
    if max(len(pair.cot_a.encode()), len(pair.cot_b.encode())) > TEXT_LIMIT:
        return "with a CoT longer than pair files may hold"
    if scores:
        found = [read_annotation(cot, dimensions, tags) for cot in (pair.cot_a, pair.cot_b)]
        if None in found:
            return "with a CoT that has no sub-scores"
        pair.scores_a, pair.scores_b = (cot["dimensional_scores"] for cot in found)
    return "kept"


def show_sure(pairs: list[ScoredPair]) -> str:
    """A table of how sure pairs are, the least sure first."""
    lines = []
    for bound in (0.99, 0.95, 0.9, 0.75):
        count = sum(pair.p >= bound for pair in pairs)
        lines.append(f"P(r_a > r_b) of {bound:.2f} or more: {count} of {len(pairs)} pairs")
    lines.append("\n     P  margin/SE  margin  better, worse")
    for pair in sorted(pairs, key=lambda pair: pair.p)[:SHOWN]:
        in_se = "–" if pair.margin_se is None else f"{pair.margin_se:.2f}"
        lines.append(f"{pair.p:6.3f}  {in_se:>9}  {pair.margin:6.2f}  {pair.video_a}, {pair.video_b}")
    if len(pairs) > SHOWN:
        lines.append(f"… and {len(pairs) - SHOWN} more, which are surer")
    return "\n".join(lines)


# ------------------------------
# The command


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("videos", type=Path, help="prompts with their videos, JSON lines")
    add("pairs", type=Path, help="the pair file to write, JSON lines")
    add("--model", type=not_empty, help=f"a saved model or a run's folder [{MODELS}]")
    add("--take", choices=("best-worst", "all"), default="best-worst",
        help="of a prompt's videos the best against the worst, or each two")
    add("--margin", type=NotNegative, default=0.0, help="how much further than this apart two "
        "scores must be, in standard deviations: the model's score_std, or if none, this file's")
    add("--scores", action="store_true",
        help="keep the CoTs' sub-scores as reference, for stage 2")
    add("--instruction", help="a file with <video> and <prompt> in it [the model's own]; "
        "problem: each prompt is a whole one")
    add_thinking(parser, repetition_penalty={"help": "as infer.py has it"})
    add("--workers", type=Whole, default=0, help="processes that decode videos ahead")
    add("--reader", **READER)
    args = parser.parse_args()
    args.thinking = read_thinking(args)
    args.out = args.pairs.with_name(args.pairs.name + ".judged")  # where judge_all keeps its own
    args.cot = "on"
    return args


def main() -> None:
    args, ranks = parse_args(), Ranks.start()
    check_out(args.pairs, args.videos)
    groups = read_groups(args.videos)
    model = DeScore.load(args.model or default_model(), reader=args.reader)
    model.check_head()
    model.processor.use_instruction(args.instruction)
    keys = []
    for group in groups:
        keys += group.keys()
    keys = list(dict.fromkeys(keys))
    ranks.agree(vars(args), args.videos, keys, model)
    if ranks.first:
        print(f"{args.videos}: {len(groups)} prompts, {len(keys)} videos", file=sys.stderr)
    judged = judge_all(model, keys, args.thinking, args, ranks)
    ranks.stop()
    if not ranks.first:
        return
    code = tables.list_unreadable(judged)
    std, whose = tables.scale(model, [r["score"] for r in judged.values() if "error" not in r])
    processor, kept, counts = model.processor, [], Counter()
    for group in groups:
        pairs = list(make_pairs(group, judged, std, args.samples, args.take))
        counts["a prompt without two videos that can be read"] += not pairs
        for pair in pairs:
            verdict = use_of(pair, args.margin, args.scores, processor.dimensions, processor.tags)
            counts[verdict] += 1
            kept += [pair] * (verdict == "kept")
    left_out = [f"; {n} left out, {why}" for why, n in counts.items() if n and why != "kept"]
    said = f"{len(kept)} pairs of {len(groups)} prompts" + "".join(left_out)
    if not kept:
        raise DataError(f"{args.pairs}: not written: {said}")
    write_pairs(args.pairs, kept)
    print(f"{args.pairs}: {said}\nmargins in standard deviations of the scores, {std:.4g}, {whose}")
    if args.samples > 1:
        print(show_sure(kept))
    sys.exit(code)


if __name__ == "__main__":
    run_command(main)
