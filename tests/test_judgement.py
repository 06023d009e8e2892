"""A reward that is no judgement does not pass as one; and whoever asks for one finds torch as it was."""

import math
import random
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import world
from conftest import ROOT
from recited import COTS
from test_adapters import save_scorer

import infer
import rl
from data import DataError, make_instruction
from infer import Scorer, judge, reward
from model import DeScore, Thoughts
from support.settings import parse_args
from tools.memory import longest_answer

SCORES = [1.0, 2.0, 4.0, 8.0]
WHOLE, BROKEN = COTS[0], COTS[4]  # of the second no answer can be read


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    rng = np.random.default_rng(3)
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    world.write_video(path, world.render(world.Clip(world.draw_scene(rng), signature="grain"), rng))
    return str(path)


@pytest.fixture
def thinks(model, monkeypatch):
    """Lets the model think what a test says, (text, whether it ends) a sample, and score it by SCORES."""
    model.processor.instruction = make_instruction(model.processor.dimensions, model.processor.tags)

    def say(*cots):
        rows = []
        for text, ends in cots:
            rows.append(torch.tensor(model.processor.encode(text) + [model.eos] * ends))
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.eos)[None]
        length = torch.tensor([len(row) for row in rows])
        mask = torch.arange(tokens.shape[2]) < length[:, None]
        scores = torch.tensor(SCORES[: len(rows)])[None]
        thoughts = Thoughts(tokens, mask[None], tokens * 0.0, scores, torch.tensor([-3.0]))
        monkeypatch.setattr(model, "think", lambda *args, **how: thoughts)
        return {"samples": len(rows)}

    return say


CASES = {
    # what is thought → the score, its deviation, how many count, what the error says
    "whole": ([(WHOLE, True)], 1.0, None, 1, None),
    "cut off": ([(WHOLE, False)], None, None, 0, "did not end within"),
    "broken": ([(BROKEN, True)], None, None, 0, "no answer that can be read"),
    "nothing": ([("", True)], None, None, 0, "no answer that can be read"),
    "two of four": ([(BROKEN, True), (WHOLE, True), (WHOLE, False), (COTS[1], True)], 5.0,
                    math.sqrt(18), 2, None),
    "one of three": ([(BROKEN, True), (WHOLE, False), (WHOLE, True)], 4.0, None, 1, None),
    "none of two": ([(WHOLE, False), (BROKEN, True)], None, None, 0, "did not end within"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_judgement_has_no_score(model, thinks, clip, case):
    cots, score, deviation, usable, message = CASES[case]
    how = thinks(*cots)
    (found,) = reward(model, clip, "p", **how)
    assert found["usable"] == usable and found.get("score_std") == (deviation and pytest.approx(deviation))
    if message:
        assert math.isnan(found["score"]) and message in found["error"] and found["standardised"] is None
        shown = cots[0]
    else:
        assert found["score"] == score and found["error"] is None
        shown = next(cot for cot in cots if cot[1] and cot[0] != BROKEN)
    assert found["cot"].startswith(shown[0]) and found["truncated"] == (not shown[1])
    assert found["format_ok"] == (shown[0] not in (BROKEN, ""))
    # Whoever accepts anything, judges pairs or evaluates keeps every score.
    mean = sum(SCORES[: len(cots)]) / len(cots)
    (accepted,) = reward(model, clip, "p", accept_any=True, **how)
    assert accepted["score"] == pytest.approx(mean) and accepted["error"] is None and "usable" not in accepted
    assert accepted["truncated"] == (not cots[0][1])
    assert next(judge(model, [(clip, "p")], **how))["score"] == pytest.approx(mean)


def test_an_instruction_of_ones_own_is_asked_about_the_end_alone(model, thinks, clip):
    thinks((BROKEN, True))
    model.processor.instruction = "<video> <prompt> How good is it?"
    (found,) = reward(model, clip, "p")
    assert found["score"] == 1.0 and found["format_ok"] is False
    thinks((BROKEN, False))
    assert math.isnan(reward(model, clip, "p")[0]["score"])


def test_without_a_cot_nothing_is_asked(model, clip):
    (found,) = reward(model, clip, "p", think=False)
    (expected,) = judge(model, [(clip, "p")], think=False)
    assert found["score"] == expected["score_no_cot"] and found["error"] is None


def test_a_cot_may_be_as_long_as_an_answer_needs(model, monkeypatch, clip):
    """As long as in training, and no longer than 2,048 tokens, as R_l pays for 2,000."""
    asked = []
    think = model.think
    monkeypatch.setattr(model, "think", lambda batch, n, longest, *args, **how: (
        asked.append(longest), think(batch, n, 4, *args, **how))[1])
    for trained, longest in ((None, 2048), (9, 9), (4096, 2048), (2048, 2048)):
        model.info = {} if trained is None else {"args": {"max_new_tokens": trained}}
        reward(model, clip, "p")
        assert asked.pop() == longest == longest_answer(model)
    reward(model, clip, "p", max_new_tokens=3000)
    assert asked == [3000]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_thought_among_numbers_that_are_none_is_an_error(model, monkeypatch, clip, value):
    """Its hidden states, and so its score, may be finite all the same."""
    logits = model.logits

    def broken(hidden):
        numbers = logits(hidden)
        numbers[..., 7] = value
        return numbers

    monkeypatch.setattr(model, "logits", broken)
    for temperature in (0.0, 1.0):
        how = {"max_new_tokens": 5, "temperature": temperature}
        (found,) = reward(model, clip, "p", accept_any=True, **how)
        assert math.isnan(found["score"]) and "its score is nan" in found["error"]
        with pytest.raises(DataError, match="its score is nan"):
            list(judge(model, [(clip, "p")], **how))


@pytest.mark.parametrize(("name", "bad", "good", "bound"), [
    ("temperature", (1e-40, 0.0099, -1.0, math.nan, math.inf), (0, 0.01, 3.0), "0.01"),
    ("top_p", (1e-50, 0.0, 0.00009, 1.1, math.nan), (0.0001, 0.5, 1.0), "0.0001")])
def test_what_nothing_can_be_drawn_at_is_refused_with_the_bound(model, monkeypatch, name, bad, good, bound,
                                                                clip, capsys):
    batch = model.processor.collate([model.processor(clip, "p")])
    for value in good:
        how = {"temperature": 1.0, name: value}
        assert model.think(batch, 1, 3, **how).logps.isfinite().all()
    for value in bad:
        with pytest.raises(DataError, match=bound):
            model.think(batch, 1, 3, **{"temperature": 1.0, name: value})
        flags = [["rl.py", "--train", "x", f"--{name}={value}"]]
        if name == "temperature":
            flags += [["infer.py", "a.mp4", "p", f"--temperature={value}"],
                      ["coldstart.py", "--train", "x", f"--eval-temperature={value}"]]
        for argv in flags:
            monkeypatch.setattr("sys.argv", argv)
            with pytest.raises(SystemExit):
                parse_args(rl.Args, "rl") if argv[0] != "infer.py" else infer.parse_args()
            assert bound in capsys.readouterr().err


def states():
    """All that is global and could change what a trainer draws or makes next."""
    name, keys, *rest = np.random.get_state()
    return (torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), rest,
            torch.get_default_dtype(), torch.get_default_device(), torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), sys.path.copy())


WORLDS = {
    "plain": nullcontext,
    "bfloat16 by default": None,
    "another device by default": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
}


def test_a_scorer_is_the_same_in_any_world_and_leaves_it_as_it_was(tmp_path, clip):
    folder = save_scorer(tmp_path / "model")
    how = {"max_new_tokens": 6, "samples": 2, "accept_any": True}
    expected = Scorer(folder, "cpu")(clip, "p", **how)
    for name, enter in WORLDS.items():
        if enter is None:
            torch.set_default_dtype(torch.bfloat16)
        try:
            with enter() if enter else nullcontext():
                before = states()
                scorer = Scorer(folder, "cpu")
                assert states() == before, name
                assert scorer(clip, "p", **how) == expected, name
                assert states() == before, name
        finally:
            torch.set_default_dtype(torch.float32)
        # And what was loaded there serves elsewhere.
        assert scorer(clip, "p", **how) == expected, name
        assert not any(p.is_inference() for p in scorer.model.parameters())


def test_float32_is_the_default_for_as_long_as_any_thread_needs_it(model, monkeypatch, clip):
    """Whoever is done first does not take it from another."""
    how = {"max_new_tokens": 2, "accept_any": True}
    expected = reward(model, clip, "p", **how)
    think, begun, over = model.think, threading.Event(), threading.Event()
    found, seen = [], []
    other = threading.Thread(target=lambda: found.extend(reward(model, clip, "p", **how)), daemon=True)

    def beside(*args, **options):
        if threading.current_thread() is other:
            begun.set()
            over.wait(10)
            seen.append(torch.get_default_dtype())
        else:
            other.start()
            begun.wait(10)
        return think(*args, **options)

    monkeypatch.setattr(model, "think", beside)
    torch.set_default_dtype(torch.bfloat16)
    try:
        first = reward(model, clip, "p", **how)
        over.set()
        other.join(10)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen == [torch.float32] and first == found == expected


def test_scorers_that_are_loaded_at_once_leave_what_all_threads_share(model, monkeypatch):
    """Each puts back torch's random numbers and Python's filters of warnings as it has found them."""
    loading, most = [], []

    def load(*args, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loading.append(torch.randn(1))
            most.append(len(loading))
            time.sleep(0.02)
            loading.pop()
        return model

    monkeypatch.setattr(DeScore, "load", load)
    before = torch.get_rng_state(), warnings.filters.copy()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: Scorer("any", "cpu"), range(4)))
    assert torch.equal(torch.get_rng_state(), before[0]) and warnings.filters == before[1]
    assert most == [1] * 4


def test_a_model_that_is_loaded_draws_as_before(model):
    """The stages draw query and head from the seed that they set."""
    torch.manual_seed(0)
    again = DeScore.load(ROOT / "toy/backbone", dtype=torch.float64, device="cpu").double()
    assert torch.equal(again.query, model.query)
