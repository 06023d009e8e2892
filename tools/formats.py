"""Pair files as the field has them: CSV files told apart by their columns.

FORMATS names each kind of CSV file and the function that puts a row of it into our terms. To read
another kind, write such a function and add a line there.
"""

import ast
import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from data import DataError, Pair, error_context, json_records
from support.files import write_whole
from tools.forgiving import by_plain_name, read_objects

SIDES = {"A": "A", "B": "B", "same": "tie", "tie": "tie", "invalid": None}
VOTES = {"leftvote": "A", "rightvote": "B", "tievote": "tie", "bothbad_vote": "tie"}
RESULTS = {side.lower(): label for side, label in SIDES.items()}
RESULTS |= {"video 1 is better": "A", "video 2 is better": "B"}
LABELS = ("TA", "Overall")  # text alignment is what this method judges
SEPARATORS = ",;\t"
NO_NUMBER = ("", "na", "n/a", "none", "null")  # in small letters


def csv_records(text: str, path: Path, label: str | None) -> Iterator[tuple[int, dict]]:
    """The rows of a CSV file in the terms of our own format, with their numbers (`csv_table`); in a row
    marked invalid the preference is None. Raises DataError, naming the file and the row, for what is
    none."""

    def is_pairs(columns: list[str]) -> bool:
        return any(needed.issubset(columns) for needed, _ in FORMATS)

    columns, rows = csv_table(text, path, is_pairs)
    if len(columns) < 2 and path.suffix.lower() not in (".csv", ".tsv"):
        yield from json_records(text, path)  # which says that it is no JSON either
        return
    convert = converter(columns, path, label)
    for number, row in rows:
        texts = {name: row.get(name) for name in ("prompt", "problem")}
        yield number, convert(row, f"{path}, row {number}") | texts


def converter(columns: list[str], path: Path, label: str | None) -> Callable[[dict, str], dict]:
    """What reads a row of a file with these columns. DataError where there is none."""
    for needed, convert in FORMATS:
        if not needed.issubset(columns):
            continue
        if convert is videoalign:
            return partial(videoalign, label=label_column(columns, label, path))
        return convert
    names = ", ".join(columns)[:300]
    raise DataError(f"{path}: a CSV file, and none of the pair formats has these columns: {names}")


def label_column(columns: list[str], label: str | None, path: Path) -> str:
    """The column of the preference: the one asked for, else the first of LABELS."""
    for name in [label] if label else LABELS:
        if name in columns:
            return name
    wanted, found = label or " or ".join(LABELS), ", ".join(columns)
    raise DataError(f"{path}: no label column {wanted}; it has {found}")


# ------------------------------------------------------------------------------------------------
# A CSV file, as a spreadsheet or pandas may have written it


def csv_table(text: str, path: Path,
              fits: Callable[[list[str]], bool]) -> tuple[list[str], Iterator[tuple[int, dict]]]:
    """The columns of a CSV file and its rows, numbered as a spreadsheet shows them: the first line is
    row 1. Blank rows, and columns without a name, are passed over.

    fits: whether these are the columns of such a file. What separates them is what a first line such
    as `sep=;` says, else the comma, semicolon or tab with which the header fits. Raises DataError,
    naming the file and the row, for rows that do not have these columns."""
    csv.field_size_limit(2**24)  # a CoT may be longer than csv allows by itself
    lines = text.split("\n")
    separators = SEPARATORS
    said = re.fullmatch(r'"?sep=([^"\w])"?', lines[0], re.IGNORECASE)
    if said:
        separators = said[1]
        lines = lines[1:] or [""]  # a spreadsheet does not show it
    with error_context(f"{path}: not a CSV file that can be read", csv.Error):
        number, separator, columns = header(lines, separators, fits)
    named = [name for name in columns if name]
    if len(set(named)) < len(named):
        raise DataError(f"{path}: a column stands twice: {', '.join(named)[:300]}")
    below = "\n".join(lines[number:])
    return named, csv_rows(below, path, number, separator, columns)


def header(lines: list[str], separators: str,
           fits: Callable[[list[str]], bool]) -> tuple[int, str, list[str]]:
    """The row of the header, what separates its columns, and their names: the first line that fits,
    with nothing above it but blank lines and # comments; else the first line that is neither."""
    for number, line in enumerate(lines, 1):
        for separator in separators:
            columns = names_in(line, separator)
            if fits(columns):
                return number, separator, columns
        if line.strip(' "' + separators) and not line.startswith("#"):
            break
    separator = max(separators, key=line.count)
    return number, separator, names_in(line, separator)


def names_in(line: str, separator: str) -> list[str]:
    return [name.strip() for name in next(csv.reader([line], delimiter=separator), [])]


def csv_rows(text: str, path: Path, header_row: int, separator: str,
             columns: list[str]) -> Iterator[tuple[int, dict]]:
    """The rows of the text below a header, numbered on from the header's."""
    places = {name: place for place, name in enumerate(columns) if name}
    width = max(places.values()) + 1
    # strict: a quote that is never closed is an error, and no cell that holds the rest of the file.
    reader = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
    number = header_row
    try:
        for number, cells in enumerate(reader, header_row + 1):
            where = f"{path}, row {number}"
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) < width or any(cell.strip() for cell in cells[width:]):
                raise DataError(f"{where}: not {width} columns")
            yield number, {name: cells[place] for name, place in places.items()}
    except csv.Error as error:
        raise DataError(f"{path}, row {number + 1}: not CSV that can be read ({error})") from error


# ------------------------------------------------------------------------------------------------
# A row of each kind → a record in our terms


def videoalign(row: dict, where: str, label: str) -> dict:
    return {"video_a": row["path_A"], "video_b": row["path_B"],
            "preference": pick(SIDES, row[label], where),
            "model_a": row.get("A_model"), "model_b": row.get("B_model")}


def genai_bench(row: dict, where: str) -> dict:
    left = row.get("left_video_path", row.get("left_video"))
    right = row.get("right_video_path", row.get("right_video"))
    if left is None or right is None:
        needed = "left_video(_path) and right_video(_path)"
        raise DataError(f"{where}: a GenAI-Bench file without {needed}")
    return {"video_a": left, "video_b": right,
            "preference": pick(VOTES, row["vote_type"], where),
            "model_a": row["left_model"], "model_b": row["right_model"]}


def descore_stage1(row: dict, where: str) -> dict:
    video_a, video_b = two_videos(row["videos"], where)
    return {"video_a": video_a, "video_b": video_b,
            "preference": pick(SIDES, row["GSB"], where),
            "cot_a": row.get("CoT_A") or None, "cot_b": row.get("CoT_B") or None}


def descore_stage2(row: dict, where: str) -> dict:
    video_a, video_b = two_videos(row["videos"], where)
    return {"video_a": video_a, "video_b": video_b} | read_answer(row["answer"], where)


def descore_evaluation(row: dict, where: str) -> dict:
    videos = {"video_a": row["video_A"], "video_b": row["video_B"]}
    return videos | read_answer(row["answer"], where)


# The columns that tell a kind, and what reads a row of it; the first that fits is taken.
FORMATS = [
    ({"path_A", "path_B", "prompt"}, videoalign),  # and VideoGen-RewardBench
    ({"left_model", "right_model", "vote_type", "prompt"}, genai_bench),
    ({"videos", "GSB"}, descore_stage1),
    ({"videos", "answer"}, descore_stage2),
    ({"video_A", "video_B", "answer"}, descore_evaluation),
]

# ------------------------------------------------------------------------------------------------
# What stands in a cell


def pick(labels: dict, value: str, where: str) -> str | None:
    """The preference that a label stands for."""
    value = value.strip()
    if value not in labels:
        known = ", ".join(labels)
        raise DataError(f"{where}: the label is {value!r}, not one of {known}")
    return labels[value]


def finite_number(value) -> float | None:
    """The number in a cell, or in JSON; None where there is none, or it is not finite. ValueError, TypeError
    or OverflowError for anything else."""
    if value is None or (isinstance(value, str) and value.strip().lower() in NO_NUMBER):
        return None
    if isinstance(value, bool):
        raise TypeError(f"{value} is none")
    number = float(value)
    return number if math.isfinite(number) else None


def two_videos(text: str, where: str) -> tuple[str, str]:
    """The two paths of a list that is written as text, in Python or JSON."""
    try:
        video_a, video_b = ast.literal_eval(text)
        if isinstance(video_a, str) and isinstance(video_b, str):
            return video_a, video_b
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    raise DataError(f"{where}: videos is not a list of two paths: {text[:80]!r}")


def read_answer(text: str, where: str) -> dict:
    """The preference, and where it has them the sub-scores, of an `answer` in DeScore's release: a
    label alone, or JSON with a gsb_result, inside <answer> or not, in a ```json fence or not."""
    block = text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    answer, result = {}, block
    if "{" in block:  # whatever stands around it
        error = f"{where}: the answer has no gsb_result that can be read: {text[:80]!r}"
        with error_context(error, ValueError, LookupError, TypeError):
            (answer,) = map(by_plain_name, read_objects(block))
            result = answer["gsb_result"]
            if not isinstance(result, str):
                raise TypeError("not a text")
    result = " ".join(result.lower().split()).rstrip(".")
    if not answer and result not in RESULTS and not result.startswith("video"):
        raise DataError(f"{where}: the answer has no gsb_result: {text[:80]!r}")
    if decides(result):
        raise DataError(f"{where}: the gsb_result {result[:80]!r} seems to name a winner, and is none of "
                        f"{', '.join(RESULTS)}")
    # The release has many words for a tie: whatever names no winner.
    found = {"preference": RESULTS.get(result, "tie")}
    for key, name in (("scores_a", "video_1_scores"), ("scores_b", "video_2_scores")):
        if name in answer:
            found[key] = answer[name]
    return found


def decides(result: str) -> bool:
    """Whether an unknown result is about one video alone, or says that one is better: "video 1 wins"."""
    if result in RESULTS or re.search(r"\b(tied?|draw|same|equal\w*|similar\w*|neither|no|none)\b", result):
        return False
    about = set(re.findall(r"[12]|\b[ab]\b", result))
    return len(about) == 1 or re.search("better|worse|prefer|win", result) is not None


def check_out(out: Path, pairs: Path) -> None:
    """Raises DataError if a command that reads `pairs` cannot write a new file to `out`."""
    if out.is_dir():
        raise DataError(f"{out}: is a directory")
    partial = out.with_name(f"{out.name}.partial")  # as `write_whole` has it
    if partial.exists() and partial.samefile(pairs):
        raise DataError(f"{out}: would first be written to {pairs}, the pair file itself; choose another")
    if out.exists() and (not out.is_file() or out.samefile(pairs)):
        what = "the pair file itself" if out.is_file() else "no plain file"
        raise DataError(f"{out}: is {what}; choose another for what is written")


def relative(video: str, folder: Path) -> str:
    """The path of a video from a folder; links to folders are followed, for ".." goes by what they
    lead to."""
    place, name = os.path.split(video)
    return os.path.join(os.path.relpath(os.path.realpath(place), os.path.realpath(folder)), name)


def write_pairs(path: str | Path, pairs: list[Pair]) -> None:
    """Write our own format, with paths relative to the file, whole or not at all."""
    path, lines = Path(path), []
    for pair in pairs:
        record = {key: value for key, value in asdict(pair).items() if value is not None}
        record.pop("row", None)  # another in this file
        for key in ("video_a", "video_b"):
            record[key] = relative(record[key], path.parent)
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    with error_context(f"{path}: cannot be written", OSError, UnicodeEncodeError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(lines))
