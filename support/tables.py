"""What infer.py prints: a judged video for a reader, figures with intervals and by generators."""

import json
import math
import statistics
import sys
from collections.abc import Callable

import torch

from data import DataError, Key, Pair, follows_format, is_number, keys_of, parse_cot

# The numbers of a record, or of its description, that have a place of their own.
PLACED = ("score", "score_std", "score_no_cot", "standardised", "overall_score", "usable")


def describe(model, record: dict) -> dict:
    """What is known of one video that a model has judged, as infer.py --json prints it."""
    note = {"note": model.info["note"]} if "note" in model.info else {}
    if "cot" not in record:
        return {"video": record["video"], "prompt": record["prompt"], "cot": None,
                "score": record["score_no_cot"], **note}
    form = model.processor.dimensions, model.processor.tags
    cot = parse_cot(record["cot"], *form) or {}
    return record | {"standardised": standardised(model, record["score"]),
                     "format_ok": follows_format(record["cot"], *form),
                     "sub_scores": cot.get("dimensional_scores"),
                     "overall_score": cot.get("overall_score"), **note}


def further(record: dict) -> dict[str, float]:
    """The numbers of a record that only some models give, such as what each part of a head says."""
    numbers = {name: value for name, value in record.items() if is_number(value)}
    return {name: value for name, value in numbers.items() if name not in PLACED}


def scale(model, scores: list[float]) -> tuple[float, str]:
    """One standard deviation of a model's scores, and whose: the model's own, over the held-out
    videos on which it was last measured, or if it has none that of these scores."""
    if model.info.get("score_std"):
        return model.info["score_std"], "the model's own (score_std in descore.json)"
    return statistics.pstdev(scores) if scores else math.nan, "of the scores found here"


def standardised(model, score: float) -> float | None:
    """A score in standard deviations from the mean of the held-out videos on which the model was
    last measured, for a Bradley-Terry score has no scale of its own; None where it never was."""
    if not model.info.get("score_std"):
        return None
    return (score - model.info["score_mean"]) / model.info["score_std"]


def ranking(model, judged: dict[Key, dict]) -> list[dict] | dict:
    """The videos of one prompt that could be read, described, the best first; of a single video
    its description. Raises DataError if none could be read."""
    records = list(judged.values())
    described = [describe(model, record) for record in records if "error" not in record]
    if not described:
        raise DataError(records[0]["error"] if len(records) == 1 else "no video can be read")
    described.sort(key=lambda record: -record["score"])
    return described if len(records) > 1 else described[0]


def check_scores(model, records: list[dict]) -> None:
    """Raises DataError, naming the video and the model, for a score that is not finite."""
    for record in records:
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise DataError(f"{record['video']}: its {name} is {value}; {model.name} has "
                                "no trained head, or broken weights")


def list_unreadable(judged: dict[Key, dict]) -> int:
    """List on stderr what is wrong with videos that could not be read; of a single video an error
    will say it. Returns an exit code, 1 if there are any."""
    errors = dict.fromkeys(r["error"] for r in judged.values() if "error" in r)
    for error in errors if len(judged) > 1 else ():
        print(f"left out: {error}", file=sys.stderr)
    return int(bool(errors))


def readable(pairs: list[Pair],
             judged: dict[Key, dict]) -> tuple[list[Pair], dict[Key, dict], dict[str, int]]:
    """The pairs of which both videos could be read, the judgements of these, and how many other
    pairs there are, {"unreadable": n}, if any."""
    bad = {key for key, record in judged.items() if "error" in record}
    kept = [pair for pair in pairs if not bad.intersection(pair.videos())]
    left_out = len(pairs) - len(kept)
    return kept, {key: judged[key] for key in keys_of(kept)}, {"unreadable": left_out} if left_out else {}


def as_json(figures) -> str:
    """JSON for users, with null for figures that have no base, such as the accuracy of ties."""
    escaped = "utf" not in str(sys.stdout.encoding).lower()  # what could not be shown
    return json.dumps(plain(figures), ensure_ascii=escaped, allow_nan=False)


def plain(value):
    """What JSON can hold, with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show_ranking(ranked: list[dict] | dict) -> str:
    """What `ranking` returns, for a reader."""
    if isinstance(ranked, dict):
        return show(ranked)
    lines = []
    for place, record in enumerate(ranked, 1):
        lines.append(f"{place}. {show_score(record)}  {record['video']}")
    return "\n".join(lines)


def show_score(record: dict) -> str:
    spread = f" ± {record['score_std']:.4f}" if "score_std" in record else ""
    z = record.get("standardised")
    place = "" if z is None else f"   ({z:+.2f} standard deviations from the mean)"
    more = "".join(f"   {name} {value:+.4f}" for name, value in further(record).items())
    return f"{record['score']:+.4f}{spread}{place}{more}"


def show(record: dict) -> str:
    """A described video for a reader: the CoT, a table of sub-scores, the score."""
    lines = []
    if record["cot"] is not None:
        lines = [record["cot"].strip(), ""]
        if record["truncated"]:
            lines.append("(the CoT ran into the token limit and was scored as it stands)")
        if not record["sub_scores"]:
            lines.append("(no sub-scores can be read from this CoT)")
        lines += [f"{name:<12} {value}" for name, value in (record["sub_scores"] or {}).items()]
    return "\n".join([*lines, f"{'score':<12} {show_score(record)}"])


def bootstrap(figure: Callable[[torch.Tensor], float], count: int,
              draws: int = 1000) -> tuple[float, float]:
    """The 95 % interval of a figure: the bootstrap's. `figure` computes it from `count` row numbers,
    drawn with replacement."""
    generator = torch.Generator().manual_seed(0)
    figures = []
    for _ in range(draws):
        rows = torch.randint(count, (count,), generator=generator)
        figures.append(figure(rows))
    ends = torch.tensor([0.025, 0.975], dtype=torch.double)
    return tuple(torch.tensor(figures, dtype=torch.double).nanquantile(ends).tolist())


def intervals(pairs: list[Pair], margins: dict[str, torch.Tensor | None],
              accuracies: dict[str, Callable]) -> dict:
    """The interval of each accuracy by margins, and a row for each two generators, where the file
    names them. margins: suffix of the figure's name → r_A − r_B (N,). DataError without pairs."""
    if not pairs:
        raise DataError("no pair has two videos that can be read")
    generators: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        if pair.model_a and pair.model_b:
            names = " / ".join(sorted((pair.model_a, pair.model_b)))
            generators.setdefault(names, []).append(i)
    rows = {names: {"pairs": len(generators[names])} for names in sorted(generators)}
    human = torch.tensor([pair.human for pair in pairs])
    ends = {}
    for suffix, margin in margins.items():
        for name, accuracy in accuracies.items() if margin is not None else ():

            def figure(rows, margin=margin, accuracy=accuracy) -> float:
                return accuracy(human[rows], margin[rows])

            ends[name + suffix] = bootstrap(figure, len(pairs))
            for names, row in rows.items():
                row[name + suffix] = figure(generators[names])
    return {"intervals": ends, "generators": rows}


def show_figure(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "–"


def show_report(figures: dict) -> str:
    """The figures of `infer.report` for a reader."""
    lines = []
    for name, value in figures.items():
        if isinstance(value, int):
            lines.append(f"{name:<24} {value}")
        elif isinstance(value, float):
            ends = [show_figure(end) for end in figures["intervals"].get(name, ())]
            interval = f"   [{', '.join(ends)}]" if ends else ""
            lines.append(f"{name:<24} {show_figure(value)}{interval}")
    for names, row in figures["generators"].items():
        cells = [f"{name} {show_figure(value)}" for name, value in row.items() if name != "pairs"]
        lines.append(f"{names}: {row['pairs']} pairs, {', '.join(cells)}")
    return "\n".join(lines)
