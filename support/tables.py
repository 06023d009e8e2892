"""What infer.py prints: a judged video for a reader, figures with intervals and by generators."""

from collections.abc import Callable

import torch

from data import Pair, follows_format, parse_cot


def describe(model, record: dict) -> dict:
    """What is known of one video that a model has judged, as infer.py --json prints it."""
    if "cot" not in record:
        return {"video": record["video"], "prompt": record["prompt"], "cot": None,
                "score": record["score_no_cot"]}
    dimensions, standardised = model.processor.dimensions, None
    cot = parse_cot(record["cot"], dimensions) or {}
    if model.info.get("score_std"):
        # A Bradley-Terry score has no scale of its own: in standard deviations from the mean of
        # the held-out videos on which the model was last measured.
        standardised = (record["score"] - model.info["score_mean"]) / model.info["score_std"]
    return record | {"standardised": standardised,
                     "format_ok": follows_format(record["cot"], dimensions),
                     "sub_scores": cot.get("dimensional_scores"),
                     "overall_score": cot.get("overall_score")}


def show_score(found: dict) -> str:
    spread = f" ± {found['score_std']:.4f}" if "score_std" in found else ""
    z = found.get("standardised")
    place = "" if z is None else f"   ({z:+.2f} standard deviations from the mean)"
    return f"{found['score']:+.4f}{spread}{place}"


def show(found: dict) -> str:
    """A described video for a reader: the CoT, a table of sub-scores, the score."""
    lines = []
    if found["cot"] is not None:
        lines = [found["cot"].strip(), ""]
        if found["truncated"]:
            lines.append("(the CoT ran into the token limit and was scored as it stands)")
        if not found["sub_scores"]:
            lines.append("(no sub-scores can be read from this CoT)")
        lines += [f"{name:<12} {value}" for name, value in (found["sub_scores"] or {}).items()]
    return "\n".join([*lines, f"{'score':<12} {show_score(found)}"])


def confidence(human: torch.Tensor, margin: torch.Tensor, accuracy: Callable,
               draws: int = 1000) -> tuple[float, float]:
    """The bootstrap's 95 % interval of an accuracy, from pairs drawn with replacement."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(draws):
        index = torch.randint(len(human), (len(human),), generator=generator)
        found.append(accuracy(human[index], margin[index]))
    ends = torch.tensor([0.025, 0.975], dtype=torch.double)
    return tuple(torch.tensor(found, dtype=torch.double).nanquantile(ends).tolist())


def intervals(pairs: list[Pair], margins: dict[str, torch.Tensor | None],
              accuracies: dict[str, Callable]) -> dict:
    """The interval of each accuracy by margins, and a row for each two generators, where the file
    names them. margins: suffix of the figure's name → r_A − r_B (N,)."""
    generators: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        if pair.model_a and pair.model_b:
            names = " / ".join(sorted((pair.model_a, pair.model_b)))
            generators.setdefault(names, []).append(i)
    rows = {names: {"pairs": len(generators[names])} for names in sorted(generators)}
    human, found = torch.tensor([pair.human for pair in pairs]), {}
    for suffix, margin in margins.items():
        for name, accuracy in accuracies.items() if margin is not None else ():
            found[name + suffix] = confidence(human, margin, accuracy)
            for names, row in rows.items():
                numbers = generators[names]
                row[name + suffix] = accuracy(human[numbers], margin[numbers])
    return {"intervals": found, "generators": rows}


def show_report(figures: dict) -> str:
    """The figures of `infer.report` for a reader."""
    lines = [f"{'pairs':<24} {figures['pairs']}"]
    for name, value in figures.items():
        if isinstance(value, float):
            low, high = figures["intervals"].get(name, (None, None))
            interval = f"   [{low:.4f}, {high:.4f}]" if low is not None else ""
            lines.append(f"{name:<24} {value:.4f}{interval}")
    for names, row in figures["generators"].items():
        cells = [f"{name} {value:.4f}" for name, value in row.items() if name != "pairs"]
        lines.append(f"{names}: {row['pairs']} pairs, {', '.join(cells)}")
    return "\n".join(lines)
