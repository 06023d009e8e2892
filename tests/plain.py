"""Figures of an evaluation, calculated plainly from what was kept: a pair file's lines, a record a video.

Nothing here is the project's. What a CoT says is known by its text: `SHORT` has CoTs by hand, which take a
third of the time of recited.py's, and `SAID` what they say.
"""

import json
import sys
from pathlib import Path

WEIGHTS = {"subject": 2, "dynamics": 2, "camera": 1, "environment": 1, "style": 1}
LABELS = {"A": 1, "B": -1, "tie": 0}


def cot(*values, before="<think>yes</think>", more="", end="</answer>"):
    scores = json.dumps(dict(zip(WEIGHTS, values, strict=True)), separators=(",", ":"))
    return f'{before}<answer>{{"dimensional_scores":{scores}{more}}}{end}'


# What each CoT says: its sub-scores, what they imply of the video (1 to 5), whether the format is kept.
SAID = {
    cot(2, 2, 2, 2, 2): ([2, 2, 2, 2, 2], 5.0, True),
    cot(2, 1, "N/A", 2, 0): ([2, 1, "N/A", 2, 0], 1 + 2 * 8 / 6, True),
    cot(0, 0, 1, 1, 2): ([0, 0, 1, 1, 2], 1 + 2 * 4 / 7, True),
    cot(0, 0, 0, 0, 0, more=',"overall_score":4.9'): ([0, 0, 0, 0, 0], 4.9, True),
    cot(1, 1, 1, 1, 1, before="so <think>yes</think>"): ([1, 1, 1, 1, 1], 3.0, False),
    cot(1, 0, 1, 1, 1, before=""): ([1, 0, 1, 1, 1], 1 + 2 * 5 / 7, False),
    cot(1, 1, 1, 1, 1, end=""): (None, None, False),
}
GOOD, MIXED, POOR, SAYS, TALKS, SILENT, BROKEN = SAID
SHORT = [*SAID, cot(*[2] * 5, before=f"<think>{'asked, seen red ' * 9}</think>")]  # the last is cut off
TOKENS = 48  # more than any has but the last


def figures(pairs: list[dict], records: list[dict]) -> dict:
    """All of a set. pairs: as their file has them; records: of each video that could be read."""
    judged = {(Path(record["video"]).name, record["prompt"]): record for record in records}
    kept = []
    seen = {}
    references = {}
    for pair in pairs:
        keys = [(Path(pair[f"video_{side}"]).name, pair["prompt"]) for side in "ab"]
        if all(key in judged for key in keys):
            kept.append((pair, *[judged[key] for key in keys]))
            for key, side in zip(keys, "ab"):
                seen[key] = judged[key]
                references[key] = pair.get(f"scores_{side}")
    found = {"pairs": len(kept)}
    if len(kept) < len(pairs):
        found["unreadable"] = len(pairs) - len(kept)
    found |= accuracies(kept)
    rows = {}
    for one in kept:
        names = [one[0].get("model_a"), one[0].get("model_b")]
        if all(names):
            rows.setdefault(" / ".join(sorted(names)), []).append(one)
    found["generators"] = {}
    for name in sorted(rows):
        found["generators"][name] = {"pairs": len(rows[name])} | accuracies(rows[name])
    found |= of_cots(kept, seen, references)
    return found


def accuracies(kept: list) -> dict:
    found = {}
    for field, suffix in (("score", ""), ("score_no_cot", "_no_cot")):
        if not all(field in a for _, a, _ in kept):
            continue
        decided = right = 0
        thresholds = [-1.0]
        for pair, a, b in kept:
            margin = a[field] - b[field]
            thresholds.append(abs(margin))
            if pair["preference"] != "tie":
                decided += 1
                right += margin > 0 if pair["preference"] == "A" else margin < 0
        found["accuracy" + suffix] = right / decided if decided else None
        best = 0
        for threshold in thresholds:
            met = 0
            for pair, a, b in kept:
                margin = a[field] - b[field]
                if abs(margin) <= threshold:
                    met += pair["preference"] == "tie"
                elif margin:
                    met += pair["preference"] == ("A" if margin > 0 else "B")
            best = max(best, met)
        found["accuracy_ties" + suffix] = best / len(kept)
    return found


def of_cots(kept: list, seen: dict, references: dict) -> dict:
    """The figures of what was thought, and of its scores: each video once."""
    if not all("cot" in record for record in seen.values()):
        return {}
    nothing = None, None, False
    points = []
    for pair, a, b in kept:
        _, of_a, _ = SAID.get(a["cot"], nothing)
        _, of_b, _ = SAID.get(b["cot"], nothing)
        if pair["preference"] == "tie":
            continue
        if of_a is None or of_b is None or of_a == of_b:
            points.append(0.5)
        else:
            points.append(1.0 if (of_a > of_b) == (pair["preference"] == "A") else 0.0)
    qualities = []
    for key, reference in references.items():
        if reference:
            scores, _, _ = SAID.get(seen[key]["cot"], nothing)
            matched = sum(reference[name] == one for name, one in zip(WEIGHTS, scores or [None] * 5))
            qualities.append(matched / 5)
    scores = [record["score"] for record in seen.values()]
    mean = sum(scores) / len(scores)
    found = {
        "accuracy_reading": sum(points) / len(points),
        "format_rate": sum(SAID.get(record["cot"], nothing)[2] for record in seen.values()) / len(scores),
        "truncated": sum(record["truncated"] for record in seen.values()) / len(scores),
        "score_mean": mean,
        "score_std": (sum((score - mean) ** 2 for score in scores) / len(scores)) ** 0.5,  # not n − 1
    }
    return found | ({"quality": sum(qualities) / len(qualities)} if qualities else {})


if __name__ == "__main__":
    import importlib

    import recited

    from support.command import run_command

    recited.COTS = SHORT
    recited.install()
    run_command(importlib.import_module(sys.argv.pop(1)).main)
