"""Scores that other models gave to the videos of a pair file, measured as ours are.

    python infer.py --pairs test.jsonl --predictions other.csv --model runs/rl

Known are JSON lines or a JSON list of objects, a CSV file, a JSON object of scores by path, and that of
VBench (a mean and a list of videos for each dimension). A row has a video and its score, with or
without the prompt; or the two videos of a pair and a score for each (video_a, video_b, score_a,
score_b; path_A, …, reward_B). infer.py's own --out is such a file too. Where several columns could be
the score, FILE:COLUMN names one.

A path is read as the pair file's are, from --root or its folder; else from the folder of the scores,
or the working folder. If no path of a file leads to a video so, as where it was made on another
machine, then the ends of the paths decide: as many parts as tell the pair file's videos apart.
"""

import json
import math
import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from data import DataError, Pair, Pairs, error_context, json_records, no_duplicates, read_text
from infer import ACCURACIES
from support import tables
from support.formats import read_pairs
from tools.formats import csv_table, finite_number

# How columns are called, in small letters, the likeliest first.
VIDEO = ("video", "path", "video_path", "video_file", "file", "file_path", "filename", "file_name",
         "video_name")
SCORE = ("score", "reward", "video_results", "final_score", "overall_score", "overall", "prediction", "pred",
         "rating", "value", "score_no_cot")
PROMPT = ("prompt", "text_prompt", "caption")
SIDES = (("a", "b"), ("1", "2"), ("left", "right"))
SHOWN = 3  # how many of what is wrong are named

Key = tuple[str, str]  # a video's absolute path, and its prompt with single spaces
Score = float | tuple[float, float]  # of a video, or of the two of a pair


class Others:
    """The scores of several files, for the pairs of one."""

    def __init__(self, args: Namespace, pairs: Pairs):
        """args: what infer.py was told. Raises DataError, naming the file and the row, for what cannot be
        understood, and for a file in which no pair has its scores."""
        self.pairs = pairs
        self.margins: dict[str, list[float | None]] = {}  # r_A − r_B of each pair, by file
        self.counts: dict[str, Counter] = {}  # of what is wrong
        root = args.root or Path(args.pairs).parent
        for source in args.predictions:
            self.margins[source], self.counts[source] = read_margins(source, pairs, root)

    @property
    def code(self) -> int:
        """The exit code: 1 where pairs were left out, as for videos that cannot be read."""
        return int(any(counts["left_out"] for counts in self.counts.values()))

    def measure(self, ours: str = "", judged: dict | None = None) -> dict:
        """The figures of each file, and the differences of the first to all others: of our model, of this
        name, where it has `judged` the videos, else of the first file."""
        predictions = {}
        for source, margins in self.margins.items():
            predictions[source] = report(self.pairs, margins) | positive(self.counts[source])
        margins = dict(self.margins)
        if judged:
            margins = {ours: own_margins(self.pairs, judged)} | margins
        first, *others = margins
        differences = []
        for other in others:
            found = difference(self.pairs, margins[first], margins[other])
            differences.append({"of": first, "minus": other, **found})
        return {"predictions": predictions, "differences": differences}

    def show(self, found: dict) -> str:
        """What `measure` returns, for a reader."""
        blocks = []
        for source, figures in found["predictions"].items():
            blocks.append(f"\n{source}\n{tables.show_report(figures)}")
        for row in found["differences"]:
            lines = [f"\n{row['of']} − {row['minus']}, on the same {row['pairs']} pairs"]
            for name, ends in row["intervals"].items():
                low, high = map(signed, ends)
                lines.append(f"{name:<24} {signed(row[name])}   [{low}, {high}]")
            blocks.append("\n".join(lines))
        return "\n".join(blocks)


def signed(value: float) -> str:
    return f"{value:+.4f}" if math.isfinite(value) else "–"


def measure_alone(args: Namespace) -> None:
    """infer.py --pairs FILE --predictions FILE without a model: what others' scores say."""
    column = "problem" if args.instruction == "problem" else "prompt"
    pairs = read_pairs(args.pairs, args.label, args.root, prompt=column)
    print(pairs.summary(), file=sys.stderr)
    others = Others(args, pairs)
    found = others.measure()
    print(tables.as_json(found) if args.json else others.show(found).strip())
    sys.exit(others.code)


# ------------------------------------------------------------------------------------------------
# Figures


def report(pairs: list[Pair], margins: list[float | None]) -> dict:
    """As `infer.report` of the pairs that have a margin: accuracies, intervals, a row for each two
    generators."""
    kept = [pair for pair, margin in zip(pairs, margins) if margin is not None]
    margin = torch.tensor([margin for margin in margins if margin is not None], dtype=torch.double)
    human = torch.tensor([pair.human for pair in kept])
    figures = {"pairs": len(kept)}
    for name, accuracy in ACCURACIES.items():
        figures[name] = accuracy(human, margin)
    return figures | tables.intervals(kept, {"": margin}, ACCURACIES)


def difference(pairs: list[Pair], one: list[float | None], other: list[float | None]) -> dict:
    """By how much the accuracies of one are higher, over the pairs that both have, with 95 % intervals.

    The bootstrap is paired: each of its draws of the pairs is measured for both, each with its own best
    threshold where ties count, and the interval is between the 2.5 % and 97.5 % quantiles of the
    differences (the percentile interval: Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    chapter 13; paired: Koehn, EMNLP 2004)."""
    rows = [i for i in range(len(pairs)) if one[i] is not None and other[i] is not None]
    human = torch.tensor([pairs[i].human for i in rows])
    ours = torch.tensor([one[i] for i in rows], dtype=torch.double)
    theirs = torch.tensor([other[i] for i in rows], dtype=torch.double)
    found = {"pairs": len(rows), "intervals": {}}
    for name, accuracy in ACCURACIES.items() if rows else ():

        def figure(drawn: torch.Tensor, accuracy: Callable = accuracy) -> float:
            return accuracy(human[drawn], ours[drawn]) - accuracy(human[drawn], theirs[drawn])

        found[name] = figure(torch.arange(len(rows)))
        found["intervals"][name] = tables.bootstrap(figure, len(rows))
    return found


def own_margins(pairs: list[Pair], judged: dict) -> list[float | None]:
    """r_A − r_B of our own judgements, of scores without a CoT where there are no others."""
    margins = []
    for pair in pairs:
        records = [judged[key] for key in pair.videos()]
        if any("error" in record for record in records):
            margins.append(None)
        else:
            field = "score" if "score" in records[0] else "score_no_cot"
            margins.append(records[0][field] - records[1][field])
    return margins


def positive(counts: Counter) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


# ------------------------------------------------------------------------------------------------
# From the rows of a file to the pairs


def read_margins(source: str, pairs: Pairs, root: str | Path) -> tuple[list[float | None], Counter]:
    """r_A − r_B of each pair by the scores of a file, None where they are not there, and how many of what
    is wrong; that is said on stderr."""
    path, column = named_column(source)
    rows = read_rows(path, column)
    columns = Columns(path, rows, column)
    folders = [root, path.parent, "."]
    scores, wrong = Table(pairs, columns, folders).read(rows)
    margins = []
    for pair in pairs:
        a, b = keys(pair)
        score = scores.get((a, b)) if columns.paired else (scores.get(a), scores.get(b))
        known = score is not None and None not in score
        margins.append(score[0] - score[1] if known else None)
    left_out = margins.count(None)
    if left_out == len(pairs):
        raise DataError(f"{path}: no pair of {pairs.path} has its scores there: {say(wrong)}. Its first row "
                        f"is about {columns.videos(rows[0][1])[0]}, the first pair about {pairs[0].video_a}")
    if wrong:
        print(f"{path}: {say(wrong)}; {left_out} of {len(pairs)} pairs left out", file=sys.stderr)
    counts = Counter({name: len(listed) for name, listed in wrong.items()})
    return margins, Counter(left_out=left_out) + counts


WHAT = {
    "missing": "without a score",
    "not_finite": "without a finite number",
    "contradicted": "with another number than before",
    "other_rows": "rows about no video of the pair file, or another prompt",
}


def say(wrong: dict[str, list[str]]) -> str:
    """What is wrong, counted, the first few by name."""
    parts = []
    for name, listed in wrong.items():
        more = ", …" if len(listed) > SHOWN else ""
        parts.append(f"{len(listed)} {WHAT[name]} ({', '.join(listed[:SHOWN])}{more})")
    return "; ".join(parts)


def keys(pair: Pair) -> tuple[Key, Key]:
    a, b = ((os.path.abspath(video), spaced(prompt)) for video, prompt in pair.videos())
    return a, b


def spaced(prompt: str) -> str:
    return " ".join(prompt.split())


class Table:
    """Which scores of a file belong to the videos of a pair file, or, of a file with a row a pair, to
    its pairs."""

    def __init__(self, pairs: list[Pair], columns: "Columns", folders: list[str | Path]):
        self.columns = columns
        self.folders = folders
        self.prompts: dict[str, list[str]] = {}  # of each video
        self.wanted = {}  # in the order of the file
        for pair in pairs:
            a, b = keys(pair)
            for place, prompt in (a, b):
                self.prompts.setdefault(place, []).append(prompt)
            self.wanted |= dict.fromkeys([(a, b)] if columns.paired else [a, b])

    def read(self, rows: list[tuple[int, dict]]) -> tuple[dict, dict[str, list[str]]]:
        """The scores by what they are of, and what is wrong: names of videos and rows."""
        scores: dict = {}
        seen: dict = {}  # the row and the number of each
        wrong: dict[str, list[str]] = {}
        places = self.places([video for _, row in rows for video in self.columns.videos(row)])
        for number, row in rows:
            score = self.columns.score(row, number)
            fitting = self.fitting(row, places)
            video = self.columns.videos(row)[0]
            if not fitting:
                wrong.setdefault("other_rows", []).append(f"row {number} {video}")
            elif score is None:
                wrong.setdefault("not_finite", []).append(f"row {number} {video}")
            for key, swapped in fitting:
                mine = score[::-1] if swapped and score else score
                first, before = seen.setdefault(key, (number, mine))
                scores.setdefault(key, mine)
                if mine != before:
                    wrong.setdefault("contradicted", []).append(f"row {number} {video}, as row {first}")
                    scores[key] = None  # nobody knows which is meant
        missing = [key for key in self.wanted if key not in seen]
        if missing:
            names = [key[0][0] if self.columns.paired else key[0] for key in missing]
            wrong["missing"] = names
        return scores, wrong

    def fitting(self, row: dict, places: dict[str, str]) -> list[tuple[Key | tuple[Key, Key], bool]]:
        """What a row is about, of all that is wanted, and whether it has B first. One without a prompt is
        about all of its videos'."""
        found = [places.get(video) for video in self.columns.videos(row)]
        if None in found:
            return []
        prompts = self.prompts[found[0]]
        if self.columns.prompt and row.get(self.columns.prompt):
            prompts = [spaced(str(row[self.columns.prompt]))]
        fitting = {}
        for prompt in prompts:
            key = tuple((place, prompt) for place in found)
            if not self.columns.paired:
                key = key[0]
            elif key[::-1] in self.wanted:
                fitting[key[::-1]] = True
            if key in self.wanted:
                fitting[key] = False
        return list(fitting.items())

    def places(self, videos: Iterable[str]) -> dict[str, str]:
        """The video of the pair file, by its absolute path, for which each path stands."""
        found = {}
        for video in dict.fromkeys(videos):
            for folder in self.folders:
                place = os.path.abspath(os.path.join(folder, video))
                if place in self.prompts:
                    found.setdefault(video, place)
        if found:
            return found
        parts = 1
        while len({tail(place, parts) for place in self.prompts}) < len(self.prompts):
            parts += 1
        ends = {tail(place, parts): place for place in self.prompts}
        print(f"{self.columns.path}: no path leads to a video; their last parts decide, {parts} of each",
              file=sys.stderr)
        return {video: ends[tail(video, parts)] for video in videos if tail(video, parts) in ends}


def tail(path: str, parts: int) -> tuple[str, ...]:
    """The last so many parts of a path."""
    return Path(os.path.normpath(path)).parts[-parts:]


# ------------------------------------------------------------------------------------------------
# The shapes of files


def named_column(source: str) -> tuple[Path, str | None]:
    """The file of FILE or FILE:COLUMN, and the column."""
    file, colon, column = source.rpartition(":")
    if colon and not Path(source).is_file():
        return Path(file), column
    return Path(source), None


def read_rows(path: Path, column: str | None) -> list[tuple[int, dict]]:
    """The rows of a file with their numbers, from 1, as objects."""
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    if text.lstrip()[:1] in ("{", "["):
        try:
            whole = json.loads(text, object_pairs_hook=no_duplicates)
        except (ValueError, RecursionError):
            rows = [(row, record) for row, record in json_records(text, path) if "made_by" not in record]
        else:
            rows = list(enumerate(objects(whole, column, path), 1))
    else:
        _, numbered = csv_table(text, path, is_header)
        rows = list(numbered)
    if not rows:
        raise DataError(f"{path}: no scores are in it")
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: not a JSON object")
    return rows


def is_header(columns: list[str]) -> bool:
    """Whether a line of a CSV file, so divided, can be its header."""
    return len(columns) > 1 and not columns[0].startswith("#")


def objects(whole: dict | list, column: str | None, path: Path) -> list:
    """The rows of a JSON document: a list of objects, or scores, or objects, by path."""
    if isinstance(whole, list):
        return whole
    if any(isinstance(value, str) for value in whole.values()):
        return [whole]  # one row, as in a file of lines
    if all(isinstance(value, list) for value in whole.values()):  # VBench
        if column is None and len(whole) == 1:
            (column,) = whole
        if column not in whole:
            raise DataError(f"{path}: name one of its dimensions, FILE:NAME: {', '.join(whole)[:300]}")
        mean_and_videos = whole[column]
        return [{**row, column: row.get("video_results")} for row in mean_and_videos[-1]]
    rows = []
    for video, value in whole.items():
        rows.append({"video": video, **(value if isinstance(value, dict) else {"score": value})})
    return rows


class Columns:
    """Which columns of a file hold what."""

    def __init__(self, path: Path, rows: list[tuple[int, dict]], column: str | None):
        """column: the score's, where it was named. Raises DataError where one is not to be found."""
        self.path = path
        self.by_name = {}
        for _, row in rows:
            for name in row:
                self.by_name.setdefault(name.strip().lower().replace(" ", "_").replace("-", "_"), name)
        named = (column.lower().replace(" ", "_").replace("-", "_"),) if column else SCORE
        self.prompt = self.one_of(PROMPT)
        self.video_columns = self.two_of(VIDEO)
        self.paired = self.video_columns is not None
        self.score_columns = self.two_of(named)
        if not self.paired:
            self.video_columns = self.needed(self.one_of(VIDEO), "a video")
            score = self.one_of(named)
            if score is None and column is None:
                score = self.only_number(rows)
            self.score_columns = self.needed(score, "its score")
        elif self.score_columns is None:
            self.needed(None, "a score for each of its two videos")

    def needed(self, name: str | None, what: str) -> list[str]:
        if name is None:
            found = ", ".join(self.by_name.values())[:300]
            raise DataError(f"{self.path}: no column is known to hold {what}; it has {found}. FILE:COLUMN "
                            "names the score's")
        return [name]

    def one_of(self, names: Iterable[str]) -> str | None:
        return next((self.by_name[name] for name in names if name in self.by_name), None)

    def two_of(self, names: Iterable[str]) -> list[str] | None:
        """The columns of A and of B with one of these names, such as path_A and path_B."""
        for name in names:
            for sides in SIDES:
                for form in ("{name}_{side}", "{side}_{name}", "{name}{side}"):
                    two = [self.by_name.get(form.format(name=name, side=side)) for side in sides]
                    if None not in two:
                        return two
        return None

    def only_number(self, rows: list[tuple[int, dict]]) -> str | None:
        """The one column that holds numbers and nothing else, if it is one."""
        found = []
        for name in self.by_name.values():
            try:
                values = [finite_number(row.get(name)) for _, row in rows]
            except (ValueError, TypeError, OverflowError):
                continue
            if any(value is not None for value in values):
                found.append(name)
        return found[0] if len(found) == 1 else None

    def videos(self, row: dict) -> list[str]:
        return [str(row.get(name, "")) for name in self.video_columns]

    def score(self, row: dict, number: int) -> Score | None:
        """A row's score, or two; None where one is not finite. DataError for what is no number."""
        where = f"{self.path}, row {number}"
        scores = []
        for name in self.score_columns:
            with error_context(f"{where}: {name} is no number", ValueError, TypeError, OverflowError):
                scores.append(finite_number(row.get(name)))
        if None in scores:
            return None
        return tuple(scores) if self.paired else scores[0]
