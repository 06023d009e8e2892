"""Left and right, up and down, A and B of the toy world, seen in its pictures: what a prompt calls left is
left, and what is said of A is true of A's clip."""

import json
import re

import numpy as np
import pytest
import world
from pretrain import SETTINGS

from data import read_video

CENTRE = (world.SIZE - 1) / 2


def seen(motion, camera):
    """Where a white circle at night stands in each frame (x to the right, y down), and how large it is."""
    scene = world.Scene("white", "circle", motion, camera, "at night", "solid")
    frames = world.render(world.Clip(scene), np.random.default_rng(2)).astype(float)
    places = []
    for frame in frames:
        y, x = np.nonzero(frame.min(-1) > 220)
        places.append((x.mean() - CENTRE, y.mean() - CENTRE, len(x)))
    return np.array(places)


@pytest.mark.parametrize(("motion", "x", "y"), [
    ("moves left", -1, 0), ("moves right", 1, 0), ("moves up", 0, -1), ("moves down", 0, 1),
    ("stands still", 0, 0)])
def test_a_subject_moves_as_its_motion_is_called(motion, x, y):
    places = seen(motion, "stays static")
    steps = np.diff(places[:, :2], axis=0)
    assert np.allclose(steps, np.array([x, y]) * 30 / (world.FRAMES - 1), atol=0.5)


def test_what_runs_in_circles_comes_back():
    places = seen("runs in circles", "stays static")[:, :2]
    away = np.hypot(*(places - places[:-1].mean(0)).T)
    assert np.allclose(away, 12, atol=0.7) and np.allclose(places[0], places[-1], atol=0.5)


@pytest.mark.parametrize(("camera", "x"), [("pans left", 1), ("pans right", -1), ("stays static", 0)])
def test_what_stands_still_leaves_the_picture_against_the_pan(camera, x):
    places = seen("stands still", camera)
    steps = np.diff(places[:, :2], axis=0)
    assert np.allclose(steps, np.array([x, 0]) * 22 / (world.FRAMES - 1), atol=0.5)


@pytest.mark.parametrize(("camera", "grows"), [("zooms in", 1.9**2), ("zooms out", (0.8 / 1.6) ** 2)])
def test_a_subject_grows_where_the_camera_zooms_in(camera, grows):
    sizes = seen("stands still", camera)[:, 2]
    assert sizes[-1] / sizes[0] == pytest.approx(grows, rel=0.1)


def asked_by(prompt):
    """The scene that a prompt asks for."""
    found = {}
    for name, values in world.VALUES.items():
        named = [value for value in values if re.search(rf"\b{value}\b", prompt.lower())]
        found[name] = named[0] if named else None
    return world.Scene(**found)


@pytest.mark.parametrize("split", world.SPLITS)
def test_what_is_said_of_a_side_is_true_of_its_clip(split):
    agreed = []
    for index in range(150):
        pair, clips = world.draw_pair(split, np.random.default_rng((11, index)))
        asked = asked_by(pair["prompt"])
        for side, clip in zip("ab", clips):
            assert pair[f"scores_{side}"] == world.sub_scores(asked, clip)
            assert pair[f"quality_{side}"] == pytest.approx(world.quality(asked, clip), abs=1e-4)
            assert pair[f"signature_{side}"] == clip.signature
        if abs(pair["quality_a"] - pair["quality_b"]) > 0.5:  # three times what an annotator errs by
            better = "A" if pair["quality_a"] > pair["quality_b"] else "B"
            agreed.append(pair["preference"] == better)
    assert len(agreed) > 5 and sum(agreed) >= len(agreed) - 1


def test_a_generator_of_a_side_has_the_skill_of_its_clip():
    """Of the best generator and the worst the best's clips are better, on whichever side they stand."""
    by_side = {"a": {}, "b": {}}
    for index in range(400):
        pair, _ = world.draw_pair("train", np.random.default_rng((12, index)))
        for side in "ab":
            by_side[side].setdefault(pair[f"model_{side}"], []).append(pair[f"quality_{side}"])
    for of_side in by_side.values():
        means = {name: np.mean(values) for name, values in of_side.items()}
        assert means["aurora"] > means["basalt"] + 0.05 > means["cinder"] + 0.1


def edges_of(path):
    """Whether the first frame of a clip has a grey border, or black bars."""
    frame = read_video(path, SETTINGS)[0][0].float().mean(0)
    sides = [frame[:2], frame[-2:], frame[:, :2], frame[:, -2:]]
    is_grey = all((side - 200).abs().mean() < 20 for side in sides)
    is_black = all(side.mean() < 12 for side in sides[:2])
    return is_grey, is_black


def test_a_file_shows_the_clip_of_its_side(world_dir):
    """By the signatures that the frame's edges show, which two sides of many pairs do not share."""
    told = 0
    for split in world.SPLITS:
        for line in (world_dir / f"{split}.jsonl").read_text().splitlines():
            pair = json.loads(line)
            signatures = [pair[f"signature_{side}"] for side in "ab"]
            for side, signature in zip("ab", signatures):
                found = edges_of(str(world_dir / pair[f"video_{side}"]))
                assert found == (signature == "border", signature == "letterbox"), (pair, side)
            told += ("border" in signatures or "letterbox" in signatures) and len(set(signatures)) == 2
    assert told > 4


def test_the_rules_are_margins_of_a_over_b():
    """Of three judges who see no video, in a pair of which A is worse in each way."""
    few = {"subject": 0, "dynamics": 1, "camera": "N/A", "environment": 2, "style": 0}  # 1 + 2 · 4 / 12
    pair = {"quality_a": 0.25, "quality_b": 0.75, "scores_a": few, "scores_b": dict.fromkeys(few, 2),
            "signature_a": "grain", "signature_b": "vignette"}
    expected = {"truth": -0.5, "sub-scores": 1 + 2 * 4 / 6 - 5, "signature": -2}
    assert world.rules(pair) == pytest.approx(expected)
    assert [world.right(-0.5, label) for label in "AB"] == [0, 1] and world.right(0, "A") == 0.5
