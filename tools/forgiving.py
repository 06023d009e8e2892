"""Annotations and references as people's endpoints write them, read as what they say.

Rollouts are rewarded, and models measured, by `data.parse_cot` alone, which forgives nothing. What is
to be a reference or goes through the filter is read in other dress as well, and becomes plain 0, 1,
2 or "N/A":

    around the JSON    text, a fence of any name, <ANSWER>, no tags at all
    the JSON           a comma too many, comments, 'these', “these” or no quotes, a line's end in a text
    names              Subject, "Overall Score", "object" for the subject, scores that stand by themselves
    a score            "2", 2.0, "2.0", {"score": 2, "reason": "…"}
    "N/A"              n/a, NA, N.A., null, none, not applicable

Nothing is guessed. What is cut off, says a thing twice, leaves one out, or holds two answers that
differ, is not read.
"""

import json
import re
from contextlib import suppress

from data import DIMENSIONS, TAGS, is_number, parse_cot

# Where JSON is mended: what may stand between two tokens, a text in any quotes, and any other word.
BETWEEN = re.compile(r"(?:\s|(?://|\#)[^\n]*|/\*.{0,500}?\*/)*", re.DOTALL)
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"' r"|'((?:[^'\\]|\\.)*)'" "|“([^”]*)”|‘([^’]*)’", re.DOTALL)
WORD = re.compile(r"[\w.+-]+(?:/\w+)?")
NUMBER = re.compile(r"-?\d{1,9}(?:\.\d{1,9})?", re.ASCII)
DEEPEST = 8  # objects and lists within each other

NOT_ASKED = {"n/a", "na", "n.a.", "null", "none", "not applicable"}
SUB_SCORES = {0: 0, 1: 1, 2: 2}


class Unclear(ValueError):
    """What can be read in no way, or in more ways than one."""


def read_annotation(text: str, dimensions=DIMENSIONS, tags=TAGS) -> dict | None:
    """What an annotation says: {"dimensional_scores": {...}, "overall_score": float | None}, as
    `parse_cot` reads it, or in other dress. None where it does not say one thing clearly."""
    strict = parse_cot(text, dimensions, tags)
    if strict is not None:
        return {name: strict[name] for name in ("dimensional_scores", "overall_score")}
    return read_agreeing(text, tags, lambda answer: read_scores_of(answer, dimensions))


def read_scores_of(answer: dict, dimensions: dict) -> dict | None:
    """What an object says of a video. KeyError if it is about something else, Unclear if it
    is not clear."""
    if "dimensional_scores" in answer:
        scores = answer["dimensional_scores"]
    else:  # the sub-scores may stand beside the overall score
        scores = {name: value for name, value in answer.items() if known_as(name, dimensions)}
        if len(scores) < len(dimensions):
            raise KeyError("dimensional_scores")
    return {"dimensional_scores": plain_scores(scores, dimensions),
            "overall_score": plain_overall(answer.get("overall_score"))}


def read_agreeing(text: str, tags, read) -> dict | None:
    """What `read` makes of the JSON objects of an answer; None unless all say the same. It raises
    KeyError for an object that is about something else, Unclear for one that is not clear."""
    readings = []
    for found in read_objects(where_it_answers(text, tags)):
        try:
            readings.append(read(by_plain_name(found)))
        except KeyError:
            continue
        except Unclear:
            return None
    agree = all(reading == readings[0] for reading in readings)
    return readings[0] if readings and agree else None


def where_it_answers(text: str, tags) -> str:
    """The part of a text in which it can answer: its answer blocks, else what is no thought."""
    thought, answer = (re.escape(tag) for tag in tags)
    some_case = re.IGNORECASE | re.DOTALL
    spoken = re.sub(f"<{thought}>(?:(?!<{thought}>).)*?</{thought}>", "", text, flags=some_case)
    spoken = re.split(f"</{thought}>", spoken, flags=some_case)[-1]  # the prompt may have opened it
    blocks = re.split(f"<{answer}>", spoken, flags=some_case)[1:]
    inside = "\n".join(re.split(f"</{answer}>", block, flags=some_case)[0] for block in blocks)
    if "{" in inside:
        return inside
    still_thinks = re.search(f"<{thought}>", spoken, flags=some_case)
    return "" if still_thinks else spoken


# ------------------------------
# Scores


def plain_scores(scores, dimensions=DIMENSIONS) -> dict:
    """Sub-scores as 0, 1, 2 or "N/A" by the names of the dimensions. Unclear where one is
    missing, stands twice, or is not clear."""
    if not isinstance(scores, dict):
        raise Unclear("no object of sub-scores")
    plain = {}
    for name, value in scores.items():
        dimension = known_as(name, dimensions)
        if dimension is None or dimension in plain:
            raise Unclear(f"{name!r} is no dimension, or stands twice")
        plain[dimension] = plain_sub_score(value)
    if len(plain) < len(dimensions):
        raise Unclear("a dimension is missing")
    return plain


def known_as(name: str, dimensions: dict) -> str | None:
    """The dimension that a name means. The paper and its data call the subject "object"."""
    if name in dimensions:
        return name
    meant = {plain_name(dimension): dimension for dimension in dimensions}
    if "subject" in meant:
        meant.setdefault("object", meant["subject"])
    return meant.get(plain_name(name))


def plain_sub_score(value) -> int | str:
    """0, 1, 2 or "N/A". Unclear for anything that is not clearly one of them."""
    value = plain_value(value)
    if value is None:
        return "N/A"
    if not is_number(value) or value not in SUB_SCORES:
        raise Unclear(f"{value!r} is no sub-score")
    return SUB_SCORES[value]


def plain_overall(value) -> float | None:
    """A number in [1, 5], or None where none is said. Unclear for anything else."""
    value = plain_value(value)
    if value is not None and not (is_number(value) and 1 <= value <= 5):
        raise Unclear(f"{value!r} is no overall score")
    return None if value is None else float(value)


def plain_value(value):
    """A number where one is meant, None where nothing is asked for; anything else as it is."""
    if isinstance(value, dict):  # with a reason beside it
        value = by_plain_name(value).get("score", value)
    if isinstance(value, str):
        value = value.strip()
        if value.casefold().replace("_", " ") in NOT_ASKED:
            return None
        return float(value) if NUMBER.fullmatch(value) else value
    return value


def by_plain_name(found: dict) -> dict:
    """An object by the plain form of its names. Unclear where two become one."""
    plain = {plain_name(name): value for name, value in found.items()}
    if len(plain) < len(found):
        raise Unclear("a name stands twice")
    return plain


def plain_name(name: str) -> str:
    """ "Overall Score" and "overall-score" are overall_score."""
    return re.sub(r"[\s_-]+", "_", name.strip().casefold())


# ------------------------------
# JSON, or what was meant to be


def read_objects(text: str) -> list[dict]:
    """The JSON objects of a text that do not stand within other braces, whatever is around them."""
    found, start = [], text.find("{")
    while start >= 0:
        try:
            value, end = read_value(text, start)
            found.append(value)
        except Unclear:  # a part of what is broken or cut off says nothing
            end = behind_brace(text, start)
        start = text.find("{", end)
    return found


def behind_brace(text: str, start: int) -> int:
    """Where what an opening brace begins has ended: behind its closing one, else with the text."""
    depth = 0
    for brace in re.compile("[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.end()
    return len(text)


def read_value(text: str, at: int, depth: int = 0) -> tuple[object, int]:
    """The value that begins at a place of a text, and where it ends. Unclear if none does."""
    at = BETWEEN.match(text, at).end()
    if depth > DEEPEST:
        raise Unclear("too deep")
    if text[at : at + 1] == "{":
        return read_object(text, at + 1, depth)
    if text[at : at + 1] == "[":
        return read_list(text, at + 1, depth)
    return read_token(text, at)


def read_token(text: str, at: int) -> tuple[str | float | None, int]:
    """The text, number, null or other word that begins here, and where it ends. Unclear if none does."""
    if quoted := QUOTED.match(text, at):
        with suppress(ValueError):  # it is JSON itself
            return json.loads(quoted[0], strict=False), quoted.end()
        return re.sub(r"\\(.)", r"\1", quoted[quoted.lastindex]), quoted.end()
    if word := WORD.match(text, at):
        value = float(word[0]) if NUMBER.fullmatch(word[0]) else word[0]
        return None if value in ("null", "None") else value, word.end()
    raise Unclear(f"no value at {at}")


def read_object(text: str, at: int, depth: int) -> tuple[dict, int]:
    """The object whose first name begins here. Unclear if a name stands twice."""
    found, closed = {}, False
    while not closed:
        at = BETWEEN.match(text, at).end()
        if text[at : at + 1] == "}":
            return found, at + 1
        name, at = read_token(text, at)
        if not isinstance(name, str) or name in found:
            raise Unclear(f"{name!r} is no name, or stands twice")
        at = BETWEEN.match(text, at).end()
        if text[at : at + 1] != ":":
            raise Unclear(f"no colon at {at}")
        found[name], at = read_value(text, at + 1, depth + 1)
        at, closed = read_separator(text, at, "}")
    return found, at


def read_list(text: str, at: int, depth: int) -> tuple[list, int]:
    """The list whose first value begins here."""
    found, closed = [], False
    while not closed:
        at = BETWEEN.match(text, at).end()
        if text[at : at + 1] == "]":
            return found, at + 1
        value, at = read_value(text, at, depth + 1)
        found.append(value)
        at, closed = read_separator(text, at, "]")
    return found, at


def read_separator(text: str, at: int, closing: str) -> tuple[int, bool]:
    """Where what follows a value ends, a comma or the closing bracket, and whether it is the latter."""
    at = BETWEEN.match(text, at).end()
    if text[at : at + 1] not in (",", closing):
        raise Unclear(f"neither , nor {closing} at {at}")
    return at + 1, text[at] == closing


def forgiven(record: dict, dimensions: dict[str, int]) -> dict:
    """A row of a pair file with its reference scores as we write them. What says nothing clear stays
    as it is."""
    plain = {}
    for key in ("scores_a", "scores_b"):
        scores = record.get(key)
        if isinstance(scores, dict) and scores and all(value is None for value in scores.values()):
            plain[key] = None  # what Parquet makes of a row that has none, where others have some
            continue
        with suppress(Unclear):
            plain[key] = plain_scores(scores, dimensions)
    for key in ("overall_a", "overall_b"):
        with suppress(Unclear):
            plain[key] = plain_overall(record.get(key))
    return record | plain
