"""Rounds: whose turn it is, what is asked once, what is not asked at all, and at what the model fails."""

import threading
import weakref

from test_serve import wait_until

from tools.client import unusable
from tools.rounds import Rounds


class Rows:
    """A score that fails at what is bad; a round begins when it is told to."""

    def __init__(self):
        self.rounds, self.go = [], threading.Semaphore(0)

    def __call__(self, videos, prompts):
        self.rounds.append(videos)
        self.go.acquire(timeout=30)
        if "bad" in videos:
            raise MemoryError("too large")
        return [{**unusable(None), "score": float(len(video))} for video in videos]


def keys(*videos):
    return [(video, "p") for video in videos]


def begun(rounds, score, *videos):
    """The jobs of a first round, which is under way."""
    jobs = rounds.ask(keys(*videos))
    wait_until(lambda: score.rounds)
    return jobs


def test_callers_take_turns_in_rounds_of_a_bounded_size():
    score = Rows()
    rounds = Rounds(score, 3, 0)
    jobs = begun(rounds, score, "first")
    for videos in ([f"a{n}" for n in range(5)], ["b0", "b1"], ["c0"]):
        jobs += rounds.ask(keys(*videos))
    score.go.release(9)
    assert [job.result(9)["score"] for job in jobs] == [5.0] + [2.0] * 8
    assert score.rounds == [["first"], ["a0", "b0", "c0"], ["a1", "b1", "a2"], ["a3", "a4"]]


def test_what_is_asked_while_it_is_under_way_is_asked_once_and_then_known():
    score = Rows()
    rounds = Rounds(score, 9, 2)
    jobs = begun(rounds, score, "a")
    jobs += rounds.ask(keys("a", "b", "b"))
    jobs += rounds.ask(keys("b", "a"))
    score.go.release(9)
    assert [job.result(9)["score"] for job in jobs] == [1.0] * 6 and score.rounds == [["a"], ["b"]]
    for video, again in (("a", False), ("c", True), ("a", False), ("b", True)):  # two are known
        del score.rounds[:]
        rounds.ask(keys(video))[0].result(9)
        assert score.rounds == [[video]] * again
    del score.rounds[:]
    rounds.ask([("b", "another prompt")])[0].result(9)
    assert score.rounds == [["b"]]


def test_what_nobody_waits_for_any_more_is_not_begun():
    score = Rows()
    rounds = Rounds(score, 9, 9)
    first = begun(rounds, score, "a")
    gone, staying = rounds.ask(keys("a", "b", "c", "d", "d")), rounds.ask(keys("c"))
    rounds.leave(gone)
    rounds.leave(first)
    again = rounds.ask(keys("d"))
    score.go.release(9)
    assert staying[0].result(9) and again[0].result(9)
    assert score.rounds == [["a"], ["c", "d"]]
    assert rounds.ask(keys("a"))[0].result(9)["score"] == 1.0 and len(score.rounds) == 2  # it was finished


class Named(str):
    """A video that can be looked for."""


def test_a_video_that_nobody_waits_for_is_let_go_at_once():
    score = Rows()
    rounds = Rounds(score, 9, 9)
    begun(rounds, score, "a")
    video = Named("large")
    seen = weakref.ref(video)
    gone = rounds.ask(keys(video, video))
    staying = rounds.ask(keys(video))
    del video
    rounds.leave(gone)
    assert seen()
    rounds.leave(staying)
    assert seen() is None
    score.go.release(9)


def test_a_video_at_which_the_model_fails_fails_alone(capsys):
    score = Rows()
    rounds = Rounds(score, 9, 9)
    score.go.release(99)
    for _ in range(2):  # and is tried again when it is asked again
        found = [job.result(9) for job in rounds.ask(keys("a", "bad", "c"))]
        assert [record["error"] is None for record in found] == [True, False, True]
        assert found[1]["error"] == "the model failed; the server's output says why"
        assert capsys.readouterr().err == "error: MemoryError: too large\n"
    assert score.rounds == [["a", "bad", "c"], ["a"], ["bad"], ["c"], ["bad"]]


def test_what_could_not_be_read_is_looked_at_again_and_what_was_no_judgement_is_known():
    asked = []
    away = unusable("no such file")
    cut_off = {**unusable("it did not end"), "cot": "a", "truncated": True}

    def score(videos, prompts):
        asked.append(videos)
        return [{"away": away, "long": cut_off}[video] for video in videos]

    rounds = Rounds(score, 9, 9)
    for _ in range(2):
        assert [job.result(9) for job in rounds.ask(keys("away", "long"))] == [away, cut_off]
    assert asked == [["away", "long"], ["away"]]
