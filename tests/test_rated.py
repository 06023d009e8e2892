"""Pairs from videos that were rated one by one."""

import csv
import json
from collections import Counter
from itertools import combinations
from statistics import fmean

import pytest

from data import DataError
from support.formats import read_pairs
from tools import convert
from tools.rated import rated_pairs, two_of


@pytest.fixture
def folder(tmp_path):
    for number in range(12):
        (tmp_path / f"{number}.mp4").write_bytes(b"x")
    return tmp_path


def write(path, rows, separator=","):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)
    return path


def ran(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["convert", *map(str, words)])
    convert.main()
    return capsys.readouterr().out


def test_the_numbers_of_pairs_are_those_of_all_pairs_in_order():
    assert [two_of(number, 5) for number in range(10)] == list(combinations(range(5), 2))


RATED = [{"text": prompt, "file": f"{number}.mp4", "look": look, "fit": fit}
         for number, (prompt, look, fit) in enumerate([
             ("a cat", 1, 4), ("a dog", 2, 2), ("a cat", 3, 2), ("a  cat ", 4.5, 4), ("a dog", 1.5, 2),
             ("a bird", 5, 5)])]


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv", "tabs.csv"])
def test_of_two_videos_of_a_prompt_the_higher_mean_is_preferred(name, folder, monkeypatch, capsys):
    path = write(folder / name, RATED, "\t" if "tabs" in name else ",")
    said = ran(monkeypatch, capsys, "--rated", path, folder / "out/pairs.jsonl", "--prompt", "text",
               "--video", "file", "--score", "look", "fit")
    assert f"out/pairs.jsonl: from {path}: 4 pairs" in said
    found = Counter()
    for pair in read_pairs(folder / "out/pairs.jsonl"):
        numbers = [int(video.rpartition("/")[2].partition(".")[0]) for video, _ in pair.videos()]
        found[pair.prompt.split()[1], *numbers, pair.preference] += 1
    expected = Counter()
    for a, b in combinations(range(len(RATED)), 2):
        prompts = [" ".join(RATED[number]["text"].split()) for number in (a, b)]
        means = [fmean((RATED[number]["look"], RATED[number]["fit"])) for number in (a, b)]
        if prompts[0] == prompts[1]:
            label = "A" if means[0] > means[1] else "B" if means[1] > means[0] else "tie"
            expected[prompts[0].split()[1], a, b, label] += 1
    assert found == expected and Counter(key[-1] for key in found) == {"tie": 1, "B": 2, "A": 1}
    only_look = rated_pairs(path, prompt="text", video="file", scores=["look"])
    assert [pair.preference for pair in only_look] == ["B", "B", "B", "A"]


def test_equal_means_are_equal_however_they_are_written(folder):
    rows = [{"prompt": "p", "video": f"{number}.mp4", "x": x, "y": y, "z": z}
            for number, (x, y, z) in enumerate([(0.1, 0.2, 0), (0.3, 0, 0), ("0.15", "0.15", "0")])]
    pairs = rated_pairs(write(folder / "r.jsonl", rows), scores=["x", "y", "z"])
    assert [pair.preference for pair in pairs] == ["tie"] * 3
    assert fmean((0.1, 0.2, 0)) != fmean((0.3, 0, 0))  # as floats have it


def test_a_video_that_is_rated_twice_has_the_mean(folder):
    (folder / "link.mp4").symlink_to(folder / "0.mp4")
    rows = [{"prompt": "p", "video": video, "score": score}
            for video, score in (("0.mp4", 6), ("1.mp4", 3), ("./link.mp4", 1))]
    (pair,) = rated_pairs(write(folder / "r.jsonl", rows))
    assert pair.preference == "A" and pair.video_b.endswith("1.mp4")  # 3.5 to 3


@pytest.mark.parametrize("lacking", ["", "NaN", " n/a ", None, "inf", float("nan")])
def test_a_row_without_a_score_is_left_out_and_named(folder, lacking, monkeypatch, capsys):
    rows = [{"prompt": "p", "video": f"{number}.mp4", "a": number, "b": number} for number in range(3)]
    rows += [{"prompt": "p", "video": "3.mp4", "a": 9, "b": lacking},
             {"prompt": "p", "video": "no.mp4", "a": 9, "b": 9}]
    said = ran(monkeypatch, capsys, "--rated", write(folder / "r.jsonl", rows), folder / "out.jsonl",
               "--score", "a", "b")
    assert "3 pairs; 1 left out, without a score: row 4 b; 1 left out, missing: row 5 " in said
    if lacking is not None:
        said = ran(monkeypatch, capsys, "--rated", write(folder / "r.csv", rows), folder / "out.jsonl",
                   "--score", "a", "b")
        assert "3 pairs; 1 left out, without a score: row 5 b; 1 left out, missing: row 6 " in said


@pytest.mark.parametrize(("change", "message"), [
    ({"score": "good"}, "row 2: score is 'good', not a number"),
    ({"score": [3]}, r"row 2: score is '\[3\]', not a number"),
    ({"score": True}, "row 2: score is 'True', not a number"),
    ({"prompt": " "}, "row 2: 'prompt' is missing or not a text"),
    ({"video": 5}, "row 2: 'video' is missing or not a text"),
    ({"video": "0.mp4"}, "r.jsonl: 0 pairs: no prompt has two rated videos"),
    ({"prompt": "another"}, "r.jsonl: 0 pairs: no prompt has two rated videos")])
def test_what_is_no_rating_is_named(folder, change, message):
    row = {"prompt": "p", "video": "0.mp4", "score": 1}
    with pytest.raises(DataError, match=message):
        rated_pairs(write(folder / "r.jsonl", [row, row | {"video": "1.mp4"} | change]))


def test_a_column_that_is_not_there_is_named(folder):
    path = write(folder / "r.csv", [{"prompt": "p", "video": "0.mp4", "quality": 1}])
    with pytest.raises(DataError, match="a CSV file without the column score; it has prompt, video, quality"):
        rated_pairs(path)


def test_pairs_are_bounded_and_drawn_by_the_seed(folder, monkeypatch, capsys):
    rows = [{"prompt": f"p{number % 2}", "video": f"{number}.mp4", "score": number % 5}
            for number in range(12)]
    path = write(folder / "r.jsonl", rows)
    every = rated_pairs(path, per_prompt=99)
    assert len(every) == 2 * 15
    few = rated_pairs(path, per_prompt=4)
    assert Counter(pair.prompt for pair in few) == {"p0": 4, "p1": 4}
    assert all(pair in every for pair in few) and few == rated_pairs(path, per_prompt=4)
    assert few != rated_pairs(path, per_prompt=4, seed=1)
    drawn = Counter(pair.videos()[0] for seed in range(200) for pair in rated_pairs(path, total=3, seed=seed))
    assert drawn.total() == 600 and len(drawn) == 10  # no last of a prompt is an A
    words = ["--rated", path, folder / "out.jsonl", "--per-prompt", 6, "--total", 7, "--seed", 3]
    ran(monkeypatch, capsys, *words)
    found = read_pairs(folder / "out.jsonl")
    assert found == rated_pairs(path, per_prompt=6, total=7, seed=3) and len(found) == 7
    assert max(Counter(pair.prompt for pair in found).values()) <= 6
    (folder / "lists").mkdir()
    other = write(folder / "lists/r.jsonl", rows)
    ran(monkeypatch, capsys, "--rated", other, folder / "out.jsonl", "--root", folder)
    assert len(read_pairs(folder / "out.jsonl")) == 20
