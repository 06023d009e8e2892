"""Preference pairs from scores: what is preferred, by how much, how sure, and what is left out."""

import json
import math
import os
import shutil
from itertools import combinations

import pytest
import torch
from conftest import ROOT, TOY_VIDEO
from launch import run, run_ranks

from data import TEXT_LIMIT, DataError, read_pairs
from model import DeScore
from support import tables
from support.formats import read_pairs as read_any
from tools import pairs as making

STD = 0.5
SAMPLING = ["--max-new-tokens", 12, "--temperature", 2]  # so that no two CoTs are the same


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """A model with a head, which a fixed seed has drawn, and with a scale of its own."""
    folder = tmp_path_factory.mktemp("scorer") / "model"
    torch.manual_seed(0)
    model = DeScore.load(ROOT / "toy/backbone", device="cpu")
    model.set_trainable(4)
    model.save(folder, score_mean=0.0, score_std=STD)
    return folder


@pytest.fixture
def videos(world_dir, tmp_path):
    """Two prompts, with three videos and with four, beside copies of these."""
    lines, clips = [], sorted((world_dir / "videos").glob("train_*.mp4"))
    for prompt, some in (("A red circle moves left.", clips[:3]), ("At sea, a cross.", clips[3:7])):
        for clip in some:
            shutil.copy(clip, tmp_path)
        lines.append({"prompt": prompt, "videos": [clip.name for clip in some],
                      "models": ["x", None, "y", "z"][: len(some)]})
    return write(tmp_path / "videos.jsonl", lines)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected(judged, videos, samples, folder, chosen):
    """The pairs of the chosen two of each prompt's judgements, by video, in plain arithmetic."""
    found = {}
    for line in videos:
        records = [judged[str(folder / name), line["prompt"]] for name in line["videos"]]
        for a, b in chosen(records):
            a, b = (a, b) if a["score"] > b["score"] else (b, a)
            margin, spread = a["score"] - b["score"], (a["score_std"] ** 2 + b["score_std"] ** 2) ** 0.5
            found[a["video"], b["video"]] = {
                "score_a": a["score"], "score_b": b["score"], "cot_a": a["cot"], "cot_b": b["cot"],
                "margin": margin / STD, "margin_se": margin / (spread / samples**0.5),
                "p": (1 + math.erf(margin / spread / 2**0.5)) / 2}
    return found


def extremes(records):
    scores = [record["score"] for record in records]
    return [(records[scores.index(max(scores))], records[scores.index(min(scores))])]


def test_pairs_of_a_file_of_prompts_with_their_videos(videos, scorer, tmp_path):
    """All, best against worst, above a margin, and after a kill; of several samples."""
    out, kept = tmp_path / "out.jsonl", tmp_path / "out.jsonl.judged"
    command = ["-m", "tools.pairs", videos, out, "--model", scorer, "--samples", 3, *SAMPLING]
    done = run(*command, "--take", "all")
    judged = {(r["video"], r["prompt"]): r for r in lines_of(kept)[1:]}
    lines, whole = lines_of(videos), out.read_bytes()
    assert len(judged) == 7 and f"{out}: 9 pairs of 2 prompts\n" in done.stdout
    assert "standard deviations of the scores, 0.5, the model's own" in done.stdout
    wanted = expected(judged, lines, 3, tmp_path, lambda records: combinations(records, 2))
    models = dict(zip(lines[0]["videos"] + lines[1]["videos"], lines[0]["models"] + lines[1]["models"]))
    found = read_any(out)
    assert len(found) == len(wanted) == 9 and not found.left_out
    for pair, record in zip(found, lines_of(out)):
        numbers = wanted[pair.video_a, pair.video_b]
        assert {name: record[name] for name in numbers} == pytest.approx(numbers)
        assert (pair.preference, pair.cot_a) == ("A", numbers["cot_a"])
        names = [os.path.basename(video) for video in (pair.video_a, pair.video_b)]
        assert [pair.model_a, pair.model_b] == [models[name] for name in names]
        assert f"{numbers['p']:6.3f}  {numbers['margin_se']:9.2f}  {numbers['margin']:6.2f}" in done.stdout
    surest = sum(numbers["p"] >= 0.75 for numbers in wanted.values())
    assert f"0.75 or more: {surest} of 9 pairs" in done.stdout
    # Killed amid the fifth judgement: the rest is judged, to the same pairs.
    before = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(b"".join(before[:5]) + before[5][:20])
    assert "going on after 4 of 7 videos" in run(*command, "--take", "all").stderr
    assert sorted(kept.read_bytes().splitlines(keepends=True)) == sorted(before)
    assert out.read_bytes() == whole
    # What is judged once serves other choices.
    assert "going on after 7 of 7 videos" in run(*command).stderr
    best = expected(judged, lines, 3, tmp_path, extremes)
    assert {(p.video_a, p.video_b) for p in read_pairs(out)} == set(best) and len(best) == 2
    smaller, larger = sorted(numbers["margin"] for numbers in best.values())
    done = run(*command, "--margin", (smaller + larger) / 2)
    assert "1 pairs of 2 prompts; 1 left out, not above the margin" in done.stdout
    assert [record["margin"] for record in lines_of(out)] == pytest.approx([larger])
    before = out.read_bytes()
    done = run(*command, "--margin", larger + 1, check=False)
    assert done.returncode == 1 and out.read_bytes() == before and "Traceback" not in done.stderr
    assert "error: " in done.stderr and "not written: 0 pairs of 2 prompts; 2 left out" in done.stderr


def test_a_video_that_cannot_be_read_costs_its_pairs_alone(videos, scorer, tmp_path):
    out, (first, second) = tmp_path / "out.jsonl", lines_of(videos)
    (tmp_path / first["videos"][1]).write_bytes(b"no video" * 100)
    gone = tmp_path / second["videos"][0]
    gone.unlink()
    lonely = {"prompt": "A lonely one.", "videos": [first["videos"][0], gone.name]}
    write(videos, [first, second, lonely])
    command = ["-m", "tools.pairs", videos, out, "--model", scorer, "--max-new-tokens", 5, "--take", "all"]
    done = run(*command, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.count("left out: ") == 2
    assert f"left out: {gone}: no such file" in done.stderr
    assert "4 pairs of 3 prompts; 1 left out, a prompt without two videos that can be read" in done.stdout
    assert len(read_pairs(out)) == 1 + 3 and "P(r_a" not in done.stdout
    assert not any("p" in record or "margin_se" in record for record in lines_of(out))


def test_ranks_make_the_pairs_that_one_makes(videos, scorer, tmp_path):
    command = ["-m", "tools.pairs", videos]
    options = ["--model", scorer, "--samples", 2, *SAMPLING, "--take", "all"]
    run(*command, tmp_path / "alone.jsonl", *options)
    first, second = run_ranks(2, *command, tmp_path / "two.jsonl", *options)
    assert "9 pairs" in first.stdout and second.stdout == ""
    alone, two = lines_of(tmp_path / "alone.jsonl"), lines_of(tmp_path / "two.jsonl")
    for record, other in zip(two, alone, strict=True):
        numbers = {name: value for name, value in other.items() if isinstance(value, float)}
        assert {name: record[name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
        assert record | numbers == other


@pytest.mark.slow
def test_both_stages_train_on_what_is_made(videos, scorer, tmp_path):
    out = tmp_path / "out.jsonl"
    done = run("-m", "tools.pairs", videos, out, "--model", scorer, "--max-new-tokens", 140, "--scores")
    made = lines_of(out)
    assert "2 pairs" in done.stdout and len(made) == 2
    for record in made:
        for side in "ab":
            _, _, answer = record[f"cot_{side}"].partition("<answer>")
            said = json.loads(answer.partition("</answer>")[0])["dimensional_scores"]
            assert record[f"scores_{side}"] == said
    common = ["--model", scorer, "--train", out, "--gradient-checkpointing", "false", "--batch-size", 2,
              "--lora-rank", 4, "--workers", 0, *TOY_VIDEO]
    run("coldstart.py", *common, "--epochs", 1, "--out", tmp_path / "1")
    run("rl.py", *common, "--steps", 1, "--updates", 1, "--group-size", 2, "--max-new-tokens", 5, "--out",
        tmp_path / "2")
    for stage in "12":
        logged = lines_of(tmp_path / stage / "metrics.jsonl")
        assert [line["step"] for line in logged if "seconds" in line] == [1]


# ------------------------------------------------------------------------------------------------------------
# In plain arithmetic


def judgement(video, score, **more):
    return {"video": video, "prompt": "p", "cot": "c", "score": score} | more


def test_how_sure_a_pair_is():
    a, b = judgement("a", 3.0, score_std=1.0), judgement("b", 1.0, score_std=1.0)
    sure = making.how_sure(a, b, 4)
    assert sure == pytest.approx({"margin_se": 2 / math.sqrt((1 + 1) / 4), "p": 0.9213503964748575})
    assert making.how_sure(a, b, 1) == {}
    for score, p in ((3.0, 1.0), (1.0, 0.5)):
        assert making.how_sure(judgement("a", score, score_std=0.0), b | {"score_std": 0.0}, 2) == {"p": p}
    # Against draws from what the approximation supposes.
    torch.manual_seed(0)
    a, b = judgement("a", 0.7, score_std=2.0), judgement("b", 0.2, score_std=0.5)
    share = (0.7 + 2.0 * torch.randn(200_000) > 0.2 + 0.5 * torch.randn(200_000)).double().mean().item()
    assert making.how_sure(a, b, 9)["p"] == pytest.approx(share, abs=0.005)


def test_equal_scores_make_no_pair_and_the_order_of_the_file_decides_among_them():
    group = making.Group("p", ["a", "b", "c", "d"], [None] * 4)
    judged = {(v, "p"): judgement(v, s) for v, s in (("a", 1.0), ("b", 2.0), ("c", 2.0), ("d", 1.0))}
    (pair,) = making.make_pairs(group, judged, 2.0)
    assert (pair.video_a, pair.video_b, pair.margin) == ("b", "d", 0.5)
    found = list(making.make_pairs(group, judged, 2.0, take="all"))
    assert [p.video_a + p.video_b for p in found] == ["bc", "ba", "bd", "ca", "cd", "ad"]
    verdicts = [making.use_of(p, 0.0, False, {}) for p in found]
    assert verdicts.count("kept") == 4 and set(verdicts) == {"kept", "not above the margin"}
    assert making.use_of(pair, 0.5, False, {}) == "not above the margin"
    pair.cot_b = "c" * (TEXT_LIMIT + 1)
    assert making.use_of(pair, 0.0, False, {}) == "with a CoT longer than pair files may hold"
    assert making.use_of(found[1], 0.0, True, {"subject": 1}) == "with a CoT that has no sub-scores"
    judged[("d", "p")] = {"video": "d", "prompt": "p", "error": "broken"}
    assert [p.video_b for p in making.make_pairs(group, judged, 2.0)] == ["a"]
    for key in list(judged)[1:]:
        judged[key] = {"error": "broken"}
    assert list(making.make_pairs(group, judged, 2.0)) == []


def test_whose_the_standard_deviation_is(model):
    scores = [1.0, 2.0, 4.0, 5.0]
    assert tables.scale(model, scores) == (pytest.approx(2.5**0.5), "of the scores found here")
    for std in (0.0, 0.25):
        model.info["score_std"] = std
        assert tables.scale(model, scores)[0] == pytest.approx(std or 2.5**0.5)
    assert "the model's own" in tables.scale(model, scores)[1]


GOOD = {"prompt": "p", "videos": ["a.mp4", "b.mp4"]}


@pytest.mark.parametrize(("record", "message"), [
    ({"videos": ["a", "b"]}, "'prompt' is missing or not a text"),
    (GOOD | {"prompt": " "}, "'prompt' is missing"), (GOOD | {"prompt": 3}, "'prompt' is missing"),
    ({"prompt": "p"}, "'videos' is missing or not a list of paths"),
    (GOOD | {"videos": "a.mp4"}, "'videos' is"), (GOOD | {"videos": ["a", None]}, "'videos' is"),
    (GOOD | {"videos": ["a", ""]}, "'videos' is"), (GOOD | {"videos": ["a"]}, "1 videos; a pair needs two"),
    (GOOD | {"videos": []}, "0 videos; a pair needs two"),
    (GOOD | {"videos": ["a", "b", "./a"]}, "a stands there 2 times"),
    (GOOD | {"models": ["x"]}, "1 models of 2 videos"), (GOOD | {"models": "xy"}, "'models' is not a list"),
    (GOOD | {"models": ["x", 3]}, "'models' is not a list"), (GOOD | {"prompt": "\ud800"}, "no Unicode text"),
    (GOOD | {"prompt": "p" * (TEXT_LIMIT + 1)}, "50,001 bytes"), ([], "not a JSON object")])
def test_a_line_that_cannot_be_understood_is_named_by_its_row(record, message, tmp_path):
    path = write(tmp_path / "v.jsonl", [GOOD, record])
    with pytest.raises(DataError, match=r"v\.jsonl, row 2\b.*" + message) as caught:
        making.read_groups(path)
    assert "\n" not in str(caught.value)


def test_what_stands_in_a_line(tmp_path):
    path = write(tmp_path / "v.jsonl", [GOOD | {"models": [None, "x"], "seed": 3}, GOOD | {"models": None}])
    first, second = making.read_groups(path)
    assert first.keys() == [(str(tmp_path / "a.mp4"), "p"), (str(tmp_path / "b.mp4"), "p")]
    assert (first.models, second.models) == ([None, "x"], [None, None])
    path.write_text("\n")
    with pytest.raises(DataError, match="v.jsonl: no prompt with its videos is in it"):
        making.read_groups(path)


def test_the_file_of_videos_is_not_written_over(videos, tmp_path):
    before = videos.read_bytes()
    done = run("-m", "tools.pairs", videos, videos, "--model", "toy/backbone", check=False)
    assert done.returncode == 1 and "choose another" in done.stderr and videos.read_bytes() == before
    done = run("-m", "tools.pairs", videos, tmp_path / "out.jsonl", "--model", "toy/backbone", check=False)
    assert done.returncode == 1 and "error: toy/backbone: has no trained" in done.stderr
    assert not (tmp_path / "out.jsonl").exists() and "Traceback" not in done.stderr
