"""Several thoughts about a video: their scores' mean and spread, the thought that is shown, and how warm they
are, at every door.

The doors: judge; infer.py (a video, several, --pairs); reward; Scorer; tools.serve (/compute and /score);
tools.pairs; tools.probe, whose samples are a spread. (tools.annotate writes one CoT a video, and the stages'
evaluation takes one thought.) How many tokens they may fill is a matter of the budgets; which numbers they
are drawn by, of the seeds.
"""

import base64
import json
import math
import statistics

import pytest
import torch
from seer import MEAN, OFFSETS, STD, Seer, ran, served

import infer
from data import read_pairs
from infer import Scorer, Thinking, by_key, judge, reward
from model import DeScore
from tools import pairs, probe, report
from tools.client import Client

PROMPTS = ["A red circle.", "A blue cross at sea."]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def clips(world_dir):
    return sorted((world_dir / "videos").glob("train_*.mp4"))[:4]


@pytest.fixture(scope="module")
def loaded(clips):
    return Seer(clips, PROMPTS)


@pytest.fixture
def seer(loaded, monkeypatch):
    yield loaded.install(monkeypatch)
    loaded.has_parts = False


@pytest.fixture
def keys(clips):
    """Of the first and the third the shown thought is cut off, of the others the second."""
    return [(str(clip), PROMPTS[place % 2]) for place, clip in enumerate(clips)]


# ------------------------------------------------------------------------------------------------------------
# Each door: asked about keys with so many samples, at a temperature or none, it returns a record for each key


def by_judge(seer, keys, flags, folder):
    return list(judge(seer.model, keys, **flags))


def by_reward(seer, keys, flags, folder):
    return reward(seer.model, *map(list, zip(*keys)), accept_any=True, **flags)


def by_scorer(seer, keys, flags, folder):
    return Scorer("seer")(*map(list, zip(*keys)), accept_any=True, **flags)


def words_of(flags):
    return [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]


def by_infer_pairs(seer, keys, flags, folder):
    lines = []
    for (a, prompt), (b, _) in zip(keys, [*keys[1:], keys[0]]):
        lines.append({"prompt": prompt, "video_a": a, "video_b": b, "preference": "A"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ran(infer.main, "--model", "seer", "--pairs", folder / "pairs.jsonl", "--out", folder / "out.jsonl",
        *words_of(flags))
    return lines_of(folder / "out.jsonl")[1:]


def by_infer(seer, keys, flags, folder):
    records = []
    for prompt in PROMPTS:
        videos = [video for video, of in keys if of == prompt]
        _, said = ran(infer.main, *videos, prompt, "--model", "seer", "--json", *words_of(flags))
        records += json.loads(said)
    return records


def by_infer_alone(seer, keys, flags, folder):
    return [json.loads(ran(infer.main, *key, "--model", "seer", "--json", *words_of(flags))[1])
            for key in keys]


def by_pairs(seer, keys, flags, folder):
    (folder / "videos.jsonl").write_text("".join(
        json.dumps({"prompt": prompt, "videos": [video for video, _ in keys]}) + "\n" for prompt in PROMPTS))
    ran(pairs.main, folder / "videos.jsonl", folder / "out.jsonl", "--model", "seer", *words_of(flags))
    return lines_of(folder / "out.jsonl.judged")[1:]


def by_server(seer, keys, flags, folder):
    with served("--window", 0, *words_of(flags)) as url:
        return Client(url)(*map(list, zip(*keys)))


DOORS = {"judge": by_judge, "reward": by_reward, "Scorer": by_scorer, "infer --pairs": by_infer_pairs,
         "infer, several": by_infer, "infer, one": by_infer_alone, "tools.pairs": by_pairs,
         "tools.serve": by_server}
SLOW = ("infer --pairs", "tools.serve")


def check(seer, keys, records, samples, temperature):
    """Against means and spreads that are worked out here."""
    named = {(record["video"], record["prompt"]): record for record in records if "video" in record}
    for place, key in enumerate(keys):
        record = named[key] if named else records[place]
        scores = [seer.score_of(key, k, temperature) for k in range(samples)]
        assert record["score"] == pytest.approx(sum(scores) / samples)
        assert record["cot"] == seer.cot(key, 0) and record["truncated"] is seer.is_cut_off(key, 0)
        if samples == 1:
            assert "score_std" not in record
        else:
            middle = sum(scores) / samples
            variance = sum((score - middle) ** 2 for score in scores) / (samples - 1)
            assert record["score_std"] == pytest.approx(math.sqrt(variance), abs=1e-6)
        if "standardised" in record:
            assert record["standardised"] == pytest.approx((record["score"] - MEAN) / STD)


@pytest.mark.parametrize("door", DOORS)
def test_a_score_is_the_mean_of_the_thoughts_and_the_first_is_shown(seer, keys, door, tmp_path):
    cases = [(3, None), (4, 0.5), (1, None), (2, 0)]
    for place, (samples, temperature) in enumerate(cases[: 2 if door in SLOW else 4]):
        flags = {"samples": samples}
        if temperature is not None:
            flags["temperature"] = temperature
        warm = temperature
        if temperature is None:
            warm = 0.0 if samples == 1 or door == "judge" else 1.0  # the function thinks as its record says
        seer.calls.clear()
        folder = tmp_path / str(place)
        folder.mkdir()
        check(seer, keys, DOORS[door](seer, keys, flags, folder), samples, warm)
        assert {(call["samples"], call["temperature"]) for call in seer.calls} == {(samples, warm)}


def test_the_other_door_of_the_server_says_the_mean_too(seer, keys):
    """/score gives numbers alone."""
    requests = []
    for video, prompt in keys:
        with open(video, "rb") as file:
            turn = {"text": prompt, "video_b64": base64.b64encode(file.read()).decode()}
        requests.append({"history": [turn], "required_rewards": ["descore"]})
    with served("--samples", 3) as url:
        found = Client(url).fetch("/score", {"requests": requests}, dict)
    check(seer, keys, found["records"], 3, 1.0)
    for record, result in zip(found["records"], found["results"]):
        numbers = result["descore"]
        assert (numbers["reward"], numbers["score"]) == (record["standardised"], record["score"])


def test_a_record_of_how_to_think_is_taken_as_it_is(seer, keys):
    for ask in (by_judge, by_reward, by_scorer):
        for temperature in (0.0, 0.75):
            thinking = Thinking(samples=3, temperature=temperature)
            check(seer, keys, ask(seer, keys, {"thinking": thinking}, None), 3, temperature)


def test_what_a_head_says_beside_is_a_mean_as_well(seer, keys):
    seer.has_parts = True
    for key, record in by_key(judge(seer.model, keys, samples=3, temperature=1.0)).items():
        mean = seer.score_of(key, 0, 0) + sum(OFFSETS[:3]) / 3 * (1 + seer.number(key) / 4)
        assert (record["part_1"], record["part_2"]) == pytest.approx((mean, 2 * mean + 1))


def test_margins_of_made_pairs_and_pages_go_by_the_mean(seer, keys, tmp_path):
    by_pairs(seer, keys, {"samples": 3}, tmp_path)
    made = read_pairs(tmp_path / "out.jsonl")
    for pair, record in zip(made, lines_of(tmp_path / "out.jsonl"), strict=True):
        a, b = ([seer.score_of(key, k, 1.0) for k in range(3)] for key in pair.videos())
        difference = statistics.fmean(a) - statistics.fmean(b)
        error = math.sqrt((statistics.variance(a) + statistics.variance(b)) / 3)
        assert record["margin"] == pytest.approx(difference / STD)
        assert record["margin_se"] == pytest.approx(difference / error)
    judged = by_key(judge(seer.model, keys, samples=3, temperature=1.0))
    report.write_page(tmp_path / "page.html", seer.model, judged)
    text = (tmp_path / "page.html").read_text()
    for record in judged.values():
        assert f'"score_std":{json.dumps(record["score_std"])}' in text


@pytest.mark.parametrize(("flags", "samples", "own", "warm"), [
    ([], 4, 0.0, 1.0), (["--temperature", 0.5, "--samples", 3], 3, 0.5, 0.5)])
def test_the_probe_thinks_once_in_each_way_and_for_the_spread_warmly(
        seer, keys, flags, samples, own, warm, tmp_path):
    keys = [(video, PROMPTS[0]) for video, _ in keys]  # of one prompt there are no intervals to draw
    path = tmp_path / "pairs.jsonl"
    lines = [{"prompt": PROMPTS[0], "video_a": a, "video_b": b, "preference": "A"}
             for (a, _), (b, _) in zip(keys[::2], keys[1::2])]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, said = ran(probe.main, path, "--model", "seer", "--json", *flags)
    assert code == 0
    found = json.loads(said)
    asked = {(call["samples"], call["temperature"]) for call in seer.calls}
    assert asked == {(1, own), (samples, warm)}
    variances = []
    again = []
    for key in keys:
        scores = [seer.score_of(key, k, warm) for k in range(samples)]
        variances.append(statistics.variance(scores))
        again.append((scores[0] - seer.score_of(key, 0, own)) / STD)
    assert found["spread"]["samples"] == samples
    assert found["spread"]["mean"] == pytest.approx(math.sqrt(statistics.fmean(variances)) / STD)
    assert found["rows"]["again"]["change"]["mean"] == pytest.approx(statistics.fmean(again))


def test_a_models_own_thoughts_are_scored_one_by_one(model, keys, monkeypatch):
    """Behind each CoT anew, of two videos in one batch."""
    kept = []
    think = DeScore.think

    def recorded(self, batch, *args, **options):
        thoughts = think(self, batch, *args, **options)
        kept.append((batch.sources, thoughts))
        return thoughts

    monkeypatch.setattr(DeScore, "think", recorded)
    judged = by_key(judge(model, keys[:2], samples=3, temperature=2.0, max_new_tokens=12))
    ((sources, thoughts),) = kept
    assert sorted(sources) == sorted(keys[:2])
    for key, tokens, mask in zip(sources, thoughts.tokens, thoughts.mask):
        alone = model.encode(model.processor.collate([model.processor(*key)]))
        cots = [model.processor.decode(row[here]) for row, here in zip(tokens, mask)]
        with torch.no_grad():
            _, scores = model.group(alone, tokens[None], mask[None])
        scores = scores[0].tolist()
        assert len(set(cots)) == 3 and judged[key]["cot"] == cots[0]
        assert judged[key]["score"] == pytest.approx(statistics.fmean(scores), abs=1e-4)
        assert judged[key]["score_std"] == pytest.approx(statistics.stdev(scores), abs=1e-4)
