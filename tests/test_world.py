"""The embedded world: the truth is the truth, the same seed makes the same data, the backbone is mediocre."""

import json
import re

import numpy as np
import pytest
import world
from conftest import ROOT
from launch import run
from pretrain import SETTINGS
from swapped import figures, with_other_videos

from data import read_pairs, read_video
from model import DeScore

CIRCLE = world.Scene("red", "circle", "moves left", "zooms in", "at sea", "solid")


@pytest.mark.parametrize(("change", "dimension", "score"), [
    ({}, "subject", 2), ({"shape": "cross"}, "subject", 1), ({"colour": "blue"}, "subject", 1),
    ({"shape": "cross", "colour": "blue"}, "subject", 0),
    ({}, "dynamics", 2), ({"motion": "moves up"}, "dynamics", 1), ({"motion": "stands still"}, "dynamics", 0),
    ({}, "camera", 2), ({"camera": "zooms out"}, "camera", 1), ({"camera": "pans left"}, "camera", 0),
    ({}, "environment", 2), ({"environment": "at night"}, "environment", 0),
    ({}, "style", 2), ({"style": "striped"}, "style", 0)])
def test_sub_scores(change, dimension, score):
    shown = world.Scene(**(vars(CIRCLE) | change))
    assert world.sub_scores(CIRCLE, shown)[dimension] == score


def test_what_is_not_asked_for_is_not_scored():
    asked = world.Scene("red", "circle", None, None, None, None)
    scores = world.sub_scores(asked, CIRCLE)
    assert scores == {"subject": 2, "dynamics": "N/A", "camera": "N/A", "environment": "N/A", "style": "N/A"}
    assert world.write_prompt(asked, np.random.default_rng(0)) == "A red circle."


def test_prompts_name_exactly_what_is_asked_for():
    rng = np.random.default_rng(0)
    for _ in range(200):
        asked = world.draw_request(rng, novel=False)
        prompt = world.write_prompt(asked, rng).lower()
        for name, values in world.VALUES.items():
            named = [value for value in values if re.search(rf"\b{value}\b", prompt)]
            assert named == [getattr(asked, name)] * (getattr(asked, name) is not None), prompt


def test_the_same_seed_makes_the_same_data_and_another_seed_another(tmp_path):
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        run(ROOT / "toy/world.py", tmp_path / name, "--pairs", 3, "--test-pairs", 2, "--seed", seed)
    for split in ("train", "test_id", "test_ood"):
        one, two, three = ((tmp_path / name / f"{split}.jsonl").read_bytes()
                           for name in ("one", "two", "three"))
        assert one == two != three
    for pair in read_pairs(tmp_path / "one/train.jsonl"):
        same = pair.video_a.replace("/one/", "/two/")
        assert (read_video(pair.video_a, SETTINGS)[0] == read_video(same, SETTINGS)[0]).all()


def test_the_splits_differ_as_they_should(world_dir):
    def models(split):
        return {record[key]
                for record in map(json.loads, (world_dir / f"{split}.jsonl").read_text().splitlines())
                for key in ("model_a", "model_b")}

    assert models("train") | models("test_id") <= set(world.TRAIN_GENERATORS)
    assert models("test_ood") <= set(world.OOD_GENERATORS)
    worst = max(world.TRAIN_GENERATORS.values(), key=lambda g: g.error_rate)
    best = min(world.OOD_GENERATORS.values(), key=lambda g: g.error_rate)
    assert worst.signature == best.signature


def test_novel_combinations_stay_out_of_training():
    rng = np.random.default_rng(0)
    requests = [world.draw_request(rng, novel=bool(i % 2)) for i in range(400)]
    assert [world.is_novel(asked) for asked in requests] == [bool(i % 2) for i in range(400)]
    for name, values in world.VALUES.items():  # no attribute is itself unseen
        assert {getattr(asked, name) for asked in requests[::2]} - {None} == set(values)


def test_the_preference_follows_the_truth():
    rng = np.random.default_rng(0)
    agree = []
    for _ in range(300):
        pair, _ = world.draw_pair(world.TRAIN_GENERATORS, False, rng)
        a, b = (world.overall_score(pair[f"scores_{side}"]) for side in "ab")
        if pair["preference"] != "tie":
            agree.append((a > b) == (pair["preference"] == "A"))
    assert 0.95 < np.mean(agree) <= 1 and len(agree) > 200


def test_the_backbone_looks_and_leaves_something_to_learn(tmp_path):
    """It keeps the format, its sub-scores are often right, and shown another video it is right less often."""
    run(ROOT / "toy/world.py", tmp_path, "--pairs", 0, "--test-pairs", 20, "--seed", 5)
    pairs = read_pairs(tmp_path / "test_id.jsonl") + read_pairs(tmp_path / "test_ood.jsonl")
    model = DeScore.load(ROOT / "toy/backbone")
    model.has_head = True  # a fresh one, whose scores are not looked at
    own, swapped = (figures(model, shown) for shown in (pairs, with_other_videos(pairs)))
    assert own["format_rate"] > 0.9 and swapped["format_rate"] > 0.9
    assert 0.55 < own["quality"] < 0.8 and swapped["quality"] < own["quality"] - 0.2
