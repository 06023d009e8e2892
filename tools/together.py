"""One question about both videos of a pair (`tools.annotate --together`), as the reference scores of
the authors' release were asked for."""

import json
import os
import random
from pathlib import Path

from data import DIMENSIONS, TAGS, DataError, checked
from tools.forgiving import plain_overall, plain_scores, read_agreeing

QUESTION = Path(__file__).resolve().parent.parent / "presets/together.txt"
PLACES = ("<video_1>", "<video_2>")  # of the videos in a question, in the order in which they are shown


def check_question(question: str, dimensions=DIMENSIONS) -> None:
    """DataError unless a question has a place for each video and the prompt, and names all that is
    to be judged."""
    checked(question, "the instruction")
    if any(question.count(place) != 1 for place in PLACES) or "<prompt>" not in question:
        raise DataError("the instruction of --together must hold <video_1> and <video_2> exactly once, "
                        "and <prompt> where the prompt belongs")
    for name in ("video_1_scores", "video_2_scores", *dimensions):
        if name not in question:
            raise DataError(f"the instruction of --together does not ask for {name}")


def b_comes_first(seed: int, video_a: str, video_b: str, prompt: str) -> bool:
    """Whether video B is shown first: a coin for each pair, the same wherever its files lie."""
    names = [os.path.basename(video) for video in (video_a, video_b)]
    return random.Random(json.dumps([seed, prompt, *names])).random() < 0.5


def read_both(text: str, dimensions=DIMENSIONS, tags=TAGS) -> list[dict] | None:
    """What an answer says of the video that was shown first, and of the other, each as
    `read_annotation` returns it. Overall scores count where both are said. None where the answer
    is not clear about both."""

    def read(answer: dict) -> list[dict]:
        numbers = (1, 2)
        scores = [plain_scores(answer[f"video_{n}_scores"], dimensions) for n in numbers]
        overall = []
        for n in numbers:
            said = answer.get(f"video_{n}_overall", answer.get(f"video_{n}_overall_score"))
            overall.append(plain_overall(said))
        if None in overall:
            overall = [None, None]
        return [{"dimensional_scores": scores[i], "overall_score": overall[i]} for i in (0, 1)]

    return read_agreeing(text, tags, read)
