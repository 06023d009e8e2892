"""rl.py with rollouts that no machine's rounding decides: each recites a CoT from a list by hand.

What is drawn at a number depends on the last digits of the probabilities, and so on the processor, the
threads and the number of processes. Here the first of the numbers that a rollout would be drawn by picks its
CoT. All else is rl.py's own, the sampling loop and the log-probabilities that it records included."""

import json

import torch

import model
from data import DIMENSIONS
from support.command import run_command


def written(values, words="asked red circle, seen red circle", end="}}\n</answer>"):
    """A CoT in the words of the embedded backbone, about 105 tokens long."""
    scores = dict(zip(DIMENSIONS, values, strict=True))
    lines = "\n".join(f"{name}: {words}, so {score}" for name, score in scores.items())
    answer = json.dumps({"dimensional_scores": scores}, separators=(",", ":")).removesuffix("}}")
    return f"<think>\n{lines}\n</think>\n<answer>\n{answer}{end}"


# Of unequal merit and length: whole, brief, with a broken answer, without an end to it, and very long.
COTS = [
    written([2, 1, "N/A", 2, 0]),
    written([1, 1, 2, 0, "N/A"], "asked moves left, seen moves left"),
    written([2, 2, 2, "N/A", 1], "red, seen red"),
    written([0, 2, 1, 2, 2], "seen"),
    written([2, 1, "N/A", 2, 0], end="}"),
    written([0, 0, 1, 1, 2], "asked, seen moves left", end=""),
    "<think>\nsubject: red circle yes, so 2\n</think>",
    written([2, 1, 1, 2, 0], "asked red circle, seen red circle, not asked, seen moves left, yes"),
]


def colons(text, n_tokens, gold):
    """A reward that differs, however early a CoT is cut off."""
    return text.count(":") / 10


def install():
    """Let every rollout that would be drawn recite instead; greedy thinking stays as it is."""
    sample, draw = model.DeScore.sample, model.draw

    def recited(self, cache, hidden, position, uniform, temperature, top_p, *penalty):
        if not temperature:
            return sample(self, cache, hidden, position, uniform, temperature, top_p, *penalty)
        tokens = torch.full(uniform.shape, self.eos)
        for row, number in zip(tokens.flatten(0, 1), uniform[..., 0].flatten().tolist()):
            cot = self.processor.encode(COTS[int(number * len(COTS))])[: len(row)]
            row[: len(cot)] = torch.tensor(cot)
        return sample(self, cache, hidden, position, tokens, temperature, top_p, *penalty)

    def next_token(logits, number, top_p=1.0):
        return draw(logits, number, top_p) if number.is_floating_point() else number

    model.DeScore.sample, model.draw = recited, next_token


if __name__ == "__main__":
    import rl

    install()
    run_command(rl.main)
