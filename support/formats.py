"""Pair files of every kind: our own format is read here, others by tools/formats.py."""

from contextlib import suppress
from pathlib import Path

from data import DIMENSIONS, DataError, Pairs, collect, is_number, json_records, read_scores, read_text
from support.above import NotHere, from_above


def read_pairs(path: str | Path, label: str | None = None, root: str | Path | None = None,
               dimensions: dict[str, int] | None = None, prompt: str = "prompt") -> Pairs:
    """Read a pair file of any kind: our own JSON lines, or a CSV file (tools/formats.py).

    label: the column of the preference, where there are several; by default TA, else Overall.
    root: the folder that paths are relative to; by default the file's own.
    dimensions: what reference sub-scores must be about; by default data.DIMENSIONS.
    prompt: the column of the prompt; "problem" where a pair brings its whole instruction, for a
    model that has none of its own.

    Returns the pairs; rows marked invalid or whose videos are missing are listed in `left_out`.
    Raises DataError, naming the file and the row, for anything that cannot be understood, a label
    outside the format's set included; NotHere for a CSV file where tools/ is not there."""
    path = Path(path)
    text = read_text(path)
    if text.lstrip()[:1] in ("{", "[", ""):
        records = json_records(text, path)
    else:
        records = from_above("tools.formats", "csv_records")(text, path, label)
    dimensions = dimensions or DIMENSIONS
    plain = ((row, with_plain_scores(record, dimensions)) for row, record in records)
    asked = ((row, with_prompt(record, prompt, f"{path}, row {row}")) for row, record in plain)
    return collect(path, asked, Path(root) if root else None, dimensions)


def findings(pairs: Pairs, train: Pairs | None = None) -> list[str]:
    """What contradicts the protocol, as tools/protocol.py finds it; nothing where that is not there."""
    with suppress(NotHere):
        return from_above("tools.protocol", "findings")(pairs, train)
    return []


def with_prompt(record: dict, column: str, where: str) -> dict:
    """The record with its `column` as the prompt. A problem is a whole instruction, and is never
    put inside another."""
    if record["preference"] is not None and not record.get(column):
        if column == "problem":
            raise DataError(f"{where}: no problem to be the instruction")
        if record.get("problem"):
            raise DataError(f"{where}: no prompt, and its problem is a whole instruction, which must "
                            "not stand inside ours: pass --instruction problem to infer.py, or add "
                            "a column with the prompts alone")
    return record | {"prompt": record.get(column)}


def with_plain_scores(record: dict, dimensions: dict[str, int]) -> dict:
    """The record with its reference scores as we write them. Those in other words are read by
    tools/forgiving.py, where it is there; what stays unread `make_pair` refuses."""
    plain = {}
    for key in ("scores_a", "scores_b"):
        scores = record.get(key)
        if scores is not None and read_scores(scores, dimensions) is None:
            return forgiven(record, dimensions)
    for key in ("overall_a", "overall_b"):
        overall = record.get(key)
        if is_number(overall) and 1 <= overall <= 5:
            plain[key] = float(overall)
        elif overall is not None:
            return forgiven(record, dimensions)
    return record | plain


def forgiven(record: dict, dimensions: dict[str, int]) -> dict:
    """What tools/forgiving.py makes of a record; the record itself where that is not there."""
    with suppress(NotHere):
        return from_above("tools.forgiving", "forgiven")(record, dimensions)
    return record
