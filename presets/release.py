"""The rewards of DeScore's released code (commit b7d6a0b), for `--preset presets/release.json`.

They read one thing in a rollout: the first closed <answer>. Whatever stands around it costs nothing;
that it must hold dimensional_scores is in the code, and not in its description.
One difference is ours: the release compares sub-scores as they are written, so that a quoted "2"
is not 2; here both are the number.
"""

import json

from data import SUB_SCORES


def format_reward(text: str, n_tokens: int, gold: dict) -> float:
    """R_f: 1 if the answer, or the fenced block in it, is JSON with dimensional_scores, else 0."""
    return float("dimensional_scores" in read_answer(text))


def quality_reward(text: str, n_tokens: int, gold: dict) -> float:
    """R_q: the share of the reference sub-scores that are matched, in [0, 1]; a dimension that the
    answer leaves out, or adds, costs no more than itself."""
    scores = read_answer(text).get("dimensional_scores")
    if not isinstance(scores, dict):
        return 0.0
    matched = 0
    for name, reference in gold.items():
        written = scores.get(name)
        if isinstance(written, (str, int, float)):
            matched += SUB_SCORES.get(written, written) == reference
    return matched / len(gold)


def length_reward(text: str, n_tokens: int, gold: dict) -> float:
    """R_l: by the characters of the text, in steps."""
    steps = {500: 0.0, 1000: 0.2, 1500: 0.4, 2000: 0.6}
    return next((reward for below, reward in steps.items() if len(text) < below), 1.0)


def read_answer(text: str) -> dict:
    """The JSON object of the first closed <answer>; {} where there is none."""
    inside, closed, _ = text.partition("<answer>")[2].partition("</answer>")
    _, fence, rest = inside.partition("```")
    block, fence_closed, _ = rest.partition("```")
    if fence and fence_closed:
        inside = block.removeprefix("json")
    try:
        answer = json.loads(inside) if closed else {}
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}
