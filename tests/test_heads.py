"""A head of one's own: what the head says has parts, and the score is made of them in one place."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

from coldstart import bt_loss
from data import DataError, Pair, read_pairs
from infer import Thinking, by_key, evaluate, fields_of, judge, report
from model import DeScore
from support import tables
from support.ranks import ALONE
from tools import report as page
from tools.journal import Journal
from tools.memory import reward

EXACT = {"rtol": 0, "atol": 3e-5}


class TwoHeads(DeScore):
    """Its second output learns another label; the score is the first, less a little of the second."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.head = nn.Linear(len(self.query), 2, bias=False)
        nn.init.normal_(self.head.weight, std=len(self.query)**-0.5)

    def overall(self, parts):
        return parts[..., 0] - 0.1 * parts[..., 1]


class Pooled(DeScore):
    """Its head reads the mean of each [Reward] and what stands before it, where whole rows are there."""

    def read_parts(self, hidden, at_reward=None):
        if at_reward is not None:
            before = F.pad(hidden[:, :-1], (0, 0, 1, 0))
            hidden = (hidden + before) / 2
        return super().read_parts(hidden, at_reward)


@pytest.fixture
def two(keys):
    torch.manual_seed(0)
    model = TwoHeads.load(ROOT / "toy/backbone", device="cpu")
    model.set_trainable(4)
    return model


def make_batch(model, keys):
    return model.processor.collate([model.processor(*key) for key in keys])


def test_two_outputs_train_on_two_labels(two, keys):
    """Who is preferred, and of which video the second label is larger, which is the other way round."""
    batch = two.encode(make_batch(two, keys[:2]))
    thoughts = two.think(batch, 2, 8, seeds=[1, 2])
    optimizer = torch.optim.AdamW(two.trainable().values(), lr=1e-2)
    losses = []
    for _ in range(6):
        _, parts = two.group_parts(batch, thoughts.tokens, thoughts.mask)  # (2, 2, 2)
        scores, label = two.overall(parts), parts[..., 1]
        loss = bt_loss(scores[0], scores[1]) + bt_loss(label[1], label[0])
        loss.backward()
        assert two.head.weight.grad.abs().sum(1).min() > 0  # both rows learn
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    scores, label = two.overall(parts), parts[..., 1]
    assert (scores[0] > scores[1]).all() and (label[1] > label[0]).all()
    # Behind a given CoT, and behind none, it is the same head.
    cots = ["so it is", None]
    torch.testing.assert_close(two.score(batch, cots), two.overall(two.score_parts(batch, cots)))
    assert two.score_parts(batch, cots).shape == (2, 2)


def test_two_outputs_are_those_of_one_forward_however_they_are_asked_for(keys):
    torch.manual_seed(0)
    two = TwoHeads.load(ROOT / "toy/backbone", device="cpu", dtype=torch.float64).double()
    two.has_head = True
    batch = make_batch(two, keys)
    thoughts = two.think(batch, 3, 10, seeds=[1, 2, 3], without_cot=True)
    assert thoughts.parts.shape == (3, 3, 2) and thoughts.scores.shape == (3, 3)
    assert thoughts.parts[..., 0].sub(thoughts.parts[..., 1]).abs().min() > 1e-4
    _, parts = two.group_parts(batch, thoughts.tokens, thoughts.mask)
    _, scores = two.group(batch, thoughts.tokens, thoughts.mask)
    torch.testing.assert_close(thoughts.parts, parts, **EXACT)
    torch.testing.assert_close(thoughts.scores, scores, **EXACT)
    torch.testing.assert_close(thoughts.scores, parts[..., 0] - 0.1 * parts[..., 1], **EXACT)
    torch.testing.assert_close(thoughts.scores_no_cot, two.score(batch, [None] * 3), **EXACT)


def test_judged_records_and_tables_have_the_parts(two, world_dir, keys, tmp_path):
    two.info |= {"score_mean": 0.0, "score_std": 1.0}
    judged = by_key(judge(two, keys, max_new_tokens=6, temperature=3.0, samples=2))
    for record in judged.values():
        assert tables.further(record) == {name: record[name] for name in ("part_1", "part_2")}
        assert record["score"] == pytest.approx(record["part_1"] - 0.1 * record["part_2"], abs=1e-5)
    first = judged[keys[0]]
    shown = tables.show_ranking(tables.describe(two, first))
    said = f"   part_1 {first['part_1']:+.4f}   part_2 {first['part_2']:+.4f}"
    assert shown.splitlines()[-1].endswith(said)
    ranking = tables.show_ranking(tables.ranking(two, judged)).splitlines()
    assert len(ranking) == 3 and all("part_2 " in line for line in ranking)
    journal = Journal(tmp_path / "j", {"cot": None}, keys)
    journal.add(first)
    assert json.loads((tmp_path / "j").read_text().splitlines()[1])["part_2"] == first["part_2"]
    page.write_page(tmp_path / "page.html", two, judged)
    assert (tmp_path / "page.html").read_text().count('"further":{"part_1":') == 3
    (rewarded,) = reward(two, *keys[0], max_new_tokens=6, accept_any=True)
    assert math.isfinite(rewarded["part_1"]) and rewarded["score"] != rewarded["part_1"]


def test_figures_of_pairs_have_the_parts(two, world_dir):
    pairs = read_pairs(world_dir / "test_id.jsonl")
    figures = evaluate(two, {"test": pairs}, ALONE, Thinking(5))
    assert {"test/accuracy", "test/accuracy_part_1", "test/accuracy_ties_part_2"} <= figures.keys()
    pairs = [Pair(str(place), "a", "b", label, model_a="x", model_b="y") for place, label in enumerate("AAB")]
    judged = {}
    for pair in pairs:
        for sign, key in zip((1, -1), pair.videos()):
            judged[key] = {"score": 1.0 * sign, "score_no_cot": 0.0, "brightness": -1.0 * sign}
    assert fields_of(judged)["brightness"] == "_brightness"
    found = report(pairs, judged, {"subject": 1})
    assert (found["accuracy"], found["accuracy_brightness"]) == (2 / 3, 1 / 3)
    assert found["generators"]["x / y"]["accuracy_brightness"] == 1 / 3
    assert "accuracy_brightness      0.3333" in tables.show_report(found)


def test_two_outputs_are_saved_and_loaded(two, keys, tmp_path):
    two.head.weight.data.normal_()
    two.save(tmp_path / "two")
    again = TwoHeads.load(tmp_path / "two", device="cpu")
    batch = make_batch(two, keys)
    assert torch.equal(two.score_parts(batch, ["so"] * 3), again.score_parts(batch, ["so"] * 3))
    assert again.head.weight.shape[0] == 2
    with pytest.raises(DataError, match=r"head\.weight \(2, 192\) does not fit"):
        DeScore.load(tmp_path / "two", device="cpu")


def test_a_head_may_read_other_states(keys):
    torch.manual_seed(0)
    model = Pooled.load(ROOT / "toy/backbone", device="cpu", dtype=torch.float64).double()
    model.has_head = True
    batch = model.encode(make_batch(model, keys))
    cot = torch.tensor(model.processor.encode("so")).expand(3, 1, -1)
    ((rows, hidden, _, at_reward),) = model.forwards(batch, cot, torch.ones_like(cot).bool())
    expected = []
    for row, place in enumerate(at_reward[:, 0]):
        mean = (hidden[row, place] + hidden[row, place - 1]) / 2
        expected.append(mean @ model.head.weight[0])
    scores = model.score(batch, ["so"] * 3)
    torch.testing.assert_close(scores[rows].double(), torch.stack(expected), **EXACT)
    model.__class__ = DeScore
    assert (model.score(batch, ["so"] * 3) - scores).abs().min() > 1e-3
