"""Preference pairs from videos that were rated one by one: of two videos of a prompt the one with the
higher mean score is preferred, and equal means are a tie."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from random import Random

from data import DataError, Pair, Pairs, checked, error_context, json_records, read_text
from tools.formats import csv_table, finite_number


@dataclass
class Rated:
    """A video and the scores that it got for a prompt; exact, so that equal means are equal."""

    prompt: str
    video: str
    scores: list[Fraction]

    def mean(self) -> Fraction:
        return sum(self.scores) / len(self.scores)


def rated_pairs(path: Path, root: Path | None = None, prompt: str = "prompt", video: str = "video",
                scores: tuple[str, ...] | list[str] = ("score",), per_prompt: int = 10,
                total: int | None = None, seed: int = 0) -> Pairs:
    """Pairs from a file of rated videos, JSON lines or CSV, a video a row.

    prompt, video, scores: the columns. A video has the mean of all its scores for a prompt, over
    columns and rows. Of the pairs of a prompt at most `per_prompt` are kept, of all at most `total`,
    drawn by the seed. Rows that lack a score or whose video is missing are listed in `left_out`.
    Raises DataError, naming the file and the row, for what cannot be understood."""
    pairs = Pairs(path)
    by_prompt: dict[str, dict[str, Rated]] = {}  # videos by where they lie
    for row, record in records(path, [prompt, video, *scores]):
        where = f"{path}, row {row}"
        text = text_of(record, prompt, where)
        file = str((root or path.parent) / text_of(record, video, where))
        found = [score_of(record, name, where) for name in scores]
        if None in found:
            detail = scores[found.index(None)]
            pairs.left_out.append({"row": row, "reason": "without a score", "detail": detail})
        elif not os.path.isfile(file):
            pairs.left_out.append({"row": row, "reason": "missing", "detail": file})
        else:
            videos = by_prompt.setdefault(" ".join(text.split()), {})
            rated = videos.setdefault(os.path.realpath(file), Rated(text, file, []))
            rated.scores += found
    rng = Random(seed)
    for videos in by_prompt.values():
        rated = list(videos.values())
        for number in sorted(draw(math.comb(len(rated), 2), per_prompt, rng)):
            first, second = two_of(number, len(rated))
            pairs.append(compare(rated[first], rated[second]))
    if total is not None:
        pairs[:] = [pairs[number] for number in sorted(draw(len(pairs), total, rng))]
    if not pairs:
        raise DataError(f"{pairs.summary()}: no prompt has two rated videos")
    return pairs


def draw(count: int, most: int, rng: Random) -> set[int]:
    """The numbers below `count`, or so many of them."""
    return set(rng.sample(range(count), min(count, most)))


def two_of(number: int, count: int) -> tuple[int, int]:
    """Which two of `count` things the pair of this number is: (0, 1), (0, 2), …, (1, 2), …"""
    first = 0
    while number >= count - 1 - first:
        number -= count - 1 - first
        first += 1
    return first, first + 1 + number


def compare(a: Rated, b: Rated) -> Pair:
    preference = "tie"
    if a.mean() != b.mean():
        preference = "A" if a.mean() > b.mean() else "B"
    return Pair(a.prompt, a.video, b.video, preference)


# ------------------------------
# A row


def records(path: Path, needed: list[str]) -> Iterator[tuple[int, dict]]:
    """The rows of a file with their numbers. DataError for a CSV file that lacks a column."""
    text = read_text(path)
    if text.lstrip()[:1] in ("{", "[", ""):
        return json_records(text, path)
    columns, rows = csv_table(text, path, set(needed).issubset)
    lacking = [name for name in needed if name not in columns]
    if lacking:
        raise DataError(f"{path}: a CSV file without the column {', '.join(lacking)}; it has "
                        f"{', '.join(columns)[:300]}")
    return rows


def text_of(record: dict, name: str, where: str) -> str:
    text = record.get(name)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: {name!r} is missing or not a text")
    return checked(text, f"{where}: {name}")


def score_of(record: dict, name: str, where: str) -> Fraction | None:
    """A score, or None where there is none. DataError for what is no number."""
    value = record.get(name)
    wrong = f"{where}: {name} is {str(value)[:80]!r}, not a number"
    with error_context(wrong, ValueError, TypeError, OverflowError):
        number = finite_number(value)
    # As it is written: 0.1 is a tenth.
    return None if number is None else Fraction(repr(number))
