"""Whose it is, of several at once (test_whose has the list): videos of one call, of one request and of two
requests in one round; test sets of one run."""

import base64
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
import world
from conftest import ROOT, TOY_VIDEO
from launch import run
from seer import MEAN, STD, Seer, scores_of, served
from test_memory import decoded

from data import parse_cot, read_video
from infer import Scorer, reward
from model import DeScore
from tools import report
from tools.client import Client, png
from tools.memory import Frames

PROMPTS = ["A red circle.", "A blue cross at sea.", "A fox runs."]


@pytest.fixture(scope="module")
def clips(world_dir):
    return sorted((world_dir / "videos").glob("train_*.mp4"))[:6]


@pytest.fixture(scope="module")
def loaded(clips):
    return Seer(clips, PROMPTS)


@pytest.fixture
def seer(loaded, monkeypatch):
    return loaded.install(monkeypatch)


# Which video, whether it comes as frames, and which prompt; None is no video. One stands there twice.
ASKED = [(3, True, 0), (0, False, 1), (None, True, 0), (5, True, 1), (3, True, 2), (2, False, 0),
         (5, True, 1)]
NUMBERS = [number for number, *_ in ASKED]
ASKED_PROMPTS = [PROMPTS[prompt] for *_, prompt in ASKED]


@pytest.fixture(scope="module")
def asked(clips):
    """The videos of ASKED as a caller holds them."""
    videos = []
    for number, as_frames, _ in ASKED:
        if number is None:
            videos.append(np.full((4, 64, 64, 3), 1.5, np.float32))  # not in [0, 1]
        else:
            videos.append(decoded(clips[number])[0] if as_frames else str(clips[number]))
    return videos


def is_of(seer, record, number, prompt):
    """Whether a record is that of a video and its prompt."""
    if number is None:
        return record["error"] is not None and record["cot"] is None
    key = (seer.videos[number], prompt)
    assert record["error"] is None and record["cot"] == seer.cot(key)
    assert record["sub_scores"] == scores_of(number)
    assert record["score"] == pytest.approx(seer.score_of(key))
    assert record["standardised"] == pytest.approx((seer.score_of(key) - MEAN) / STD)
    return True


def are_of(seer, records):
    return all(is_of(seer, *one) for one in zip(records, NUMBERS, ASKED_PROMPTS, strict=True))


class Torn:
    """A video whose first frame can be read, so that its prompt has a length, and no other."""

    total = world.FRAMES
    fps = world.FPS
    seconds = tuple(index / world.FPS for index in range(world.FRAMES))

    def frames(self, indices):
        for index in indices:
            if index:
                raise ValueError("torn")
            yield np.zeros((64, 64, 3), np.uint8)


@pytest.mark.parametrize("who", ["reward", "Scorer"])
def test_a_reward_is_its_videos(seer, asked, who):
    ask = Scorer("seer") if who == "Scorer" else partial(reward, seer.model)
    # The torn one has the longest prompt, and stands before the others in their batch.
    torn, *records = ask([Torn(), *asked], [PROMPTS[1], *ASKED_PROMPTS], fps=world.FPS, accept_any=True)
    assert "torn" in torn["error"] and are_of(seer, records)
    (call,) = seer.calls
    assert len(call["keys"]) == 5  # one batch, and nothing in it twice


def pngs(frames):
    return [base64.b64encode(png(frame)).decode() for frame in frames]


def test_served_videos_are_told_apart(seer, asked, clips):
    frames = [(3, 2), (None, 0), (5, 0), (3, 1), (0, 2)]  # numbers of a video and its prompt
    rates = [4, 4, 5, 6, 5]
    files = [(1, 0), (4, 1), (None, 0), (1, 2)]
    body = {"prompt": [PROMPTS[prompt] for _, prompt in frames], "fps": rates, "video": []}
    for number, _ in frames:
        body["video"].append(["AAAA"] * 4 if number is None else pngs(decoded(clips[number])[0]))
    requests = []
    for place, (number, prompt) in enumerate(files):
        content = b"not a video" * 100 if number is None else clips[number].read_bytes()
        turn = {"text": PROMPTS[prompt], "video_b64": base64.b64encode(content).decode()}
        requests.append({"history": [turn], "required_rewards": ["descore"], "sample_id": place})
    # What a request says of its frames counts before what the server says.
    flags = ["--window", 0.2, "--unusable", -9, "--fps", 9]
    with served(*flags) as url, ThreadPoolExecutor() as pool:
        # Two requests, most likely in one round.
        first = pool.submit(Client(url).fetch, "/compute", body, dict)
        second = pool.submit(Client(url).fetch, "/score", {"requests": requests}, dict)
        of_frames = first.result()
        of_files = second.result()
        told = {}
        for call in seer.calls:
            told |= dict(zip(call["keys"], call["stamps"]))
        assert len(told) == 4 + 3
        records = Client(url, parallel=7)(asked, ASKED_PROMPTS, fps=world.FPS)
    settings = seer.model.processor.settings
    for place, (number, prompt) in enumerate(frames):
        record = of_frames["records"][place]
        assert is_of(seer, record, number, PROMPTS[prompt])
        assert of_frames["errors"][place] == record["error"]
        expected = -9 if number is None else record["standardised"]
        assert of_frames["rewards"][place] == pytest.approx(expected)
        if number is not None:
            _, seconds = read_video(Frames([*decoded(clips[number])[0]], rates[place]), settings)
            last = sum(seconds[-2:]) / 2
            assert told[seer.videos[number], PROMPTS[prompt]] == pytest.approx(last, abs=0.051)
    for place, (number, prompt) in enumerate(files):
        record = of_files["records"][place]
        assert is_of(seer, record, number, PROMPTS[prompt])
        assert of_files["identities"][place]["sample_id"] == place
        if number is None:
            assert of_files["results"][place] == {}
            assert of_files["errors"][place] == {"descore": record["error"]}
            continue
        said = {name: value for name, value in scores_of(number).items() if value != "N/A"}
        reward = {"reward": record["standardised"], "score": record["score"]}
        assert of_files["results"][place] == {"descore": reward | said}
    assert are_of(seer, records)


# ------------------------------------------------------------------------------------------------------------
# Test sets of one run, and its rollouts


SETS = ("train", "test_id")  # no order of names; the last gives the scale


@pytest.fixture(scope="module")
def sets(world_dir, tmp_path_factory):
    """Files of two pairs each, by name, of which both sides' references differ; all paths are absolute."""
    folder = tmp_path_factory.mktemp("sets")
    found = {}
    for name in SETS:
        lines = lines_of(world_dir / f"{name}.jsonl")
        pairs = [pair for pair in lines if pair["scores_a"] != pair["scores_b"]][:2]
        for pair in pairs:
            pair |= {side: str(world_dir / pair[side]) for side in ("video_a", "video_b")}
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return found


@pytest.fixture(scope="module")
def trained(sets, tmp_path_factory):
    """A step of stage 2 from a model whose head a seed has drawn: the folders of that model and of the run,
    and what is kept of the run. All CoTs are recited, those of its evaluation too."""
    folder = tmp_path_factory.mktemp("several")
    torch.manual_seed(0)
    start = DeScore.load(ROOT / "toy/backbone", device="cpu", video={"min_pixels": 4096, "max_pixels": 4096})
    start.set_trainable(4)
    start.save(folder / "start")
    run(ROOT / "tests/recited.py", "--model", folder / "start", "--train", sets["test_id"], "--test",
        *sets.values(), "--out", folder / "run", "--steps", 1, "--batch-size", 2, "--updates", 1,
        "--group-size", 2, "--lora-rank", 4, "--max-new-tokens", 106, "--keep-rollouts", 4, "--eval-before",
        "false", "--workers", 0, "--lr", 1e-3, "--eval-temperature", 1, "--gradient-checkpointing", "false",
        *TOY_VIDEO)
    names = ("held_out", "rollouts", "metrics")
    return folder / "start", folder / "run", {name: lines_of(folder / f"run/{name}.jsonl") for name in names}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def videos_of(path):
    """(video, prompt, reference) of each video of a pair file."""
    found = []
    for pair in lines_of(path):
        found += [(pair[f"video_{side}"], pair["prompt"], pair[f"scores_{side}"]) for side in "ab"]
    return found


def scored(model, videos, cots):
    """What a model gives each of several videos behind each of the CoTs: (videos, CoTs)."""
    samples = [model.processor(video, prompt) for video, prompt, _ in videos]
    with torch.no_grad():
        batch = model.encode(model.processor.collate(samples))
        return torch.stack([model.score(batch, [cot] * len(videos)) for cot in cots], 1)


def test_a_run_keeps_of_each_video_what_is_its_own(trained, sets):
    start, _, kept = trained
    videos = videos_of(sets["test_id"])
    said = [(record["video"], record["prompt"], record["reference"]) for record in kept["rollouts"]]
    assert sorted(said, key=str) == sorted(videos, key=str)  # in the order of the batch, the preferred first
    model = DeScore.load(start, device="cpu")
    for record in kept["rollouts"]:
        found = scored(model, videos, [rollout["cot"] for rollout in record["rollouts"]])
        away = (found - torch.tensor([rollout["score"] for rollout in record["rollouts"]])).abs().amax(1)
        nearest = away.argmin()
        assert away[nearest] < 1e-3 and videos[nearest][:2] == (record["video"], record["prompt"])
        for rollout in record["rollouts"]:
            read = parse_cot(rollout["cot"])
            reference = record["reference"].items()
            same = [read["dimensional_scores"][name] == value for name, value in reference] if read else [0]
            assert rollout["reward_quality"] == pytest.approx(sum(same) / len(same))


def test_each_test_set_has_its_own_figures_and_the_last_gives_the_scale(trained, sets):
    _, out, kept = trained
    model = DeScore.load(out / "model", device="cpu")
    figures = kept["metrics"][-1]
    means = {}
    for name, path in sets.items():
        records = [record for record in kept["held_out"] if record["test"] == name]
        videos = videos_of(path)
        assert [(record["video"], record["prompt"], record["reference"]) for record in records] == videos
        scores = torch.tensor([[record["score"], record["score_no_cot"]] for record in records])
        *behind, without = scored(model, videos, [record["cot"] for record in records] + [None]).T
        for place, found in enumerate(behind):
            for away in ((found - scores[place, 0]).abs(), (without - scores[place, 1]).abs()):
                assert away[place] < 1e-3 and away.argmin() == place
        scores = [record["score"] for record in records]
        means[name] = statistics.fmean(scores)
        assert figures[f"{name}/score_mean"] == pytest.approx(means[name])
        assert figures[f"{name}/score_std"] == pytest.approx(statistics.pstdev(scores))
    assert abs(means["train"] - means["test_id"]) > 1e-3
    info = json.loads((out / "model/descore.json").read_text())
    assert info["score_mean"] == pytest.approx(means["test_id"])
    assert info["score_std"] == pytest.approx(statistics.pstdev(scores))  # of the last set's videos
    lowest, *_, highest = info["score_quantiles"]
    assert [lowest, info["score_quantiles"][50], highest] == pytest.approx(
        [min(scores), statistics.median(scores), max(scores)], abs=1e-3)


def test_the_page_of_a_run_has_each_thought_with_its_video(trained):
    _, out, kept = trained
    _, page, strips = report.run_page(report.RunFolder(out))
    records = kept["held_out"] + kept["rollouts"]
    for found, record in zip(page["thoughts"], records, strict=True):
        video = page["videos"][found["video"]]
        assert {name: video[name] for name in ("video", "prompt", "reference")} == {
            name: record[name] for name in ("video", "prompt", "reference")}
        assert video["test"] == record.get("test")
        assert [one["cot"] for one in found["thoughts"]] == [
            one["cot"] for one in record.get("rollouts", [record])]
    files = list(dict.fromkeys(video["video"] for video in page["videos"]))
    assert [files[video["strip"]] for video in page["videos"]] == [v["video"] for v in page["videos"]]
    assert len(strips) == len(files) < len(page["videos"])
