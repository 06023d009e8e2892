"""Others' scores of a pair file's videos (infer.py --predictions), in every shape, compared by the same
protocol; each figure is calculated again, plainly (plain.py)."""

import json
import math
import re
import sys
from itertools import product
from math import comb

import plain
import pytest
import torch
from conftest import ROOT
from launch import run

import infer
from data import DataError, Pair
from model import DeScore
from tools.predictions import difference, own_margins

# prompt, A, B, label, who made A, who made B; videos stand in folders by who made them.
PAIRS = [("p", 0, 1, "A", "x", "y"), ("p", 2, 1, "B", "x", "y"), ("q", 3, 4, "tie", "x", "y"),
         ("q", 3, 5, "A", "x", "z"), ("r", 6, 7, "B", "z", "y"), ("s", 8, 9, "tie", "z", "z")]
MADE = ["x", "y", "x", "x", "y", "z", "z", "y", "z", "z"]
PROMPTS = ["p", "p", "p", "q", "q", "q", "r", "r", "s", "s"]
SCORES = [0.5, -0.25, 1.0, 2.0, 1.75, 2.5, 0.125, 0.25, 3.0, -3.0]
OTHERS = [0.5, 0.25, 0.0, 1.0, 1.5, 0.5, 1.0, 2.0, 0.0, 0.0]


def video(number):
    return f"{MADE[number]}/v{number}.mp4"


@pytest.fixture
def folder(tmp_path):
    """A pair file with videos that are never opened."""
    lines = []
    for prompt, a, b, label, model_a, model_b in PAIRS:
        lines.append({"prompt": prompt, "video_a": video(a), "video_b": video(b), "preference": label,
                      "model_a": model_a, "model_b": model_b})
    for number in range(len(SCORES)):
        (tmp_path / video(number)).parent.mkdir(exist_ok=True)
        (tmp_path / video(number)).write_text("")
    write_lines(tmp_path / "pairs.jsonl", lines)
    return tmp_path


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def expected(folder, scores):
    """What plain.py makes of the scores; None: a video has none."""
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    records = [{"video": video(number), "prompt": PROMPTS[number], "score": score}
               for number, score in enumerate(scores) if score is not None]
    found = plain.figures(pairs, records)
    found.pop("unreadable", None)
    return found


@pytest.fixture
def measured(folder, monkeypatch, capsys):
    """What infer.py prints of files of scores, on stderr too, and the exit code."""

    def measure(*sources, pairs=folder / "pairs.jsonl", more=()):
        words = ["infer.py", "--pairs", pairs, "--predictions", *sources, "--json", *more]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        with pytest.raises(SystemExit) as ended:
            infer.main()
        out, err = capsys.readouterr()
        return json.loads(out), err, ended.value.code

    return measure


def same(found, wanted):
    """The figures of a file are these."""
    found = dict(found)
    ends = found.pop("intervals")
    assert set(ends) == {"accuracy", "accuracy_ties"}
    for name, (low, high) in ends.items():
        assert low <= found[name] <= high
    assert found.pop("generators") == {name: pytest.approx(row) for name, row in wanted["generators"].items()}
    assert found == pytest.approx({name: value for name, value in wanted.items() if name != "generators"})


def as_csv(columns, rows):
    return "".join(",".join(map(str, row)) + "\n" for row in [columns, *rows])


def rows_of_pairs(scores, swapped=()):
    rows = []
    for place, (prompt, a, b, *_) in enumerate(PAIRS):
        a, b = (b, a) if place in swapped else (a, b)
        rows.append((video(a), video(b), prompt, scores[a], scores[b]))
    return rows


NUMBERED = list(enumerate(SCORES))
SHAPES = {
    "lines": "".join(json.dumps({"video": video(n), "prompt": PROMPTS[n], "score": s}) + "\n"
                     for n, s in NUMBERED),
    "our own": json.dumps({"made_by": {"seed": 0}}) + "\n" + "".join(
        json.dumps({"video": video(n), "prompt": PROMPTS[n], "cot": "c", "truncated": False, "score": s,
                    "score_no_cot": -s}) + "\n" for n, s in NUMBERED),
    "list": json.dumps([{"path": "./" + video(n), "reward": str(s)} for n, s in NUMBERED], indent=1),
    "by path": json.dumps({video(n): s for n, s in NUMBERED}),
    "objects by path": json.dumps({video(n): {"steps": [n], "VQ": s} for n, s in NUMBERED}),
    "table": as_csv(["Video Path", "seconds", "Final-Score"], [(video(n), 1.5, s) for n, s in NUMBERED]),
    "one number": as_csv(["name", "file", "text alignment"], [("a b", video(n), s) for n, s in NUMBERED]),
    "prompts": as_csv(["prompt", "filename", "score"],
                      [(f" {PROMPTS[n]}", video(n), s) for n, s in NUMBERED]),
    "pairs": as_csv(["path_A", "path_B", "prompt", "reward_A", "reward_B"], rows_of_pairs(SCORES)),
    "turned": as_csv(["left_video", "right_video", "caption", "left_score", "right_score"],
                     rows_of_pairs(SCORES, swapped=(0, 2, 4))),
    "pair lines": "".join(json.dumps({"video_1": a, "video_2": b, "score_1": s, "score_2": t}) + "\n"
                          for a, b, _, s, t in rows_of_pairs(SCORES, swapped=(1,))),
    "vbench": json.dumps({"overall_consistency": [0.5, [{"video_path": video(n), "video_results": s}
                                                        for n, s in NUMBERED]]}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_file_of_any_shape_has_the_figures_of_its_scores(shape, folder, measured):
    (folder / "scores").write_text(SHAPES[shape])
    found, err, code = measured(folder / "scores")
    assert list(found["predictions"]) == [str(folder / "scores")] and found["differences"] == []
    same(found["predictions"][str(folder / "scores")], expected(folder, SCORES))
    assert code == 0 and len(err.splitlines()) == 1  # what the pair file is


def test_a_column_is_chosen_by_its_name(folder, measured):
    rows = [(video(n), SCORES[n], OTHERS[n]) for n in range(len(SCORES))]
    (folder / "two.csv").write_text(as_csv(["video", "VQ", "TA"], rows))
    two = {}
    for name, scores in (("VQ", SCORES), ("TA", OTHERS)):
        two[name] = [0.0, [{"video_path": video(n), "video_results": s} for n, s in enumerate(scores)]]
    (folder / "two.json").write_text(json.dumps(two))
    (folder / "pairs.csv").write_text(as_csv(
        ["video_a", "video_b", "prompt", "TA_a", "TA_b"], rows_of_pairs(OTHERS)))
    sources = [f"{folder / name}:TA" for name in ("two.csv", "two.json", "pairs.csv")]
    found, _, _ = measured(*sources)
    for source in sources:
        same(found["predictions"][source], expected(folder, OTHERS))
    assert [row["accuracy"] for row in found["differences"]] == [0.0, 0.0]
    for name, message in (("two.csv", "its score; it has video, VQ, TA. FILE:COLUMN"),
                          ("two.json", "name one of its dimensions, FILE:NAME: VQ, TA"),
                          ("pairs.csv", "a score for each of its two videos; it has")):
        with pytest.raises(DataError, match=f"{name}: .*{message}"):
            measured(folder / name)


def test_paths_are_the_pair_files_or_else_their_ends_decide(folder, measured, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    wanted = expected(folder, SCORES)
    monkeypatch.chdir(folder / "x")
    for form in (f"{folder}/{{}}", "../{}", "/gone/videos/{}", "a/b/{}"):
        rows = [{"video": form.format(video(n)), "score": s} for n, s in NUMBERED]
        source = write_lines(elsewhere / "scores.jsonl", rows)
        found, err, _ = measured(source)
        same(found["predictions"][str(source)], wanted)
        assert ("no path leads to a video; their last parts decide, 1 of each" in err) == (
            form[:2] in ("/g", "a/"))
    # Of two videos with one name the folder decides, and a path that fits keeps the others from guessing.
    text = (folder / "pairs.jsonl").read_text().replace("z/v5.mp4", "z/v4.mp4")
    (folder / "z/v5.mp4").rename(folder / "z/v4.mp4")
    (folder / "pairs.jsonl").write_text(text)
    rows = [{"video": "/gone/" + video(n).replace("z/v5", "z/v4"), "score": s} for n, s in NUMBERED]
    found, err, code = measured(write_lines(elsewhere / "ends.jsonl", rows))
    assert found["predictions"][str(elsewhere / "ends.jsonl")]["accuracy_ties"] == wanted["accuracy_ties"]
    assert "2 of each" in err and code == 0
    rows[0]["video"] = video(0)
    with pytest.raises(DataError, match=r"ends.jsonl: no pair of .* its scores there: 9 rows about no video"):
        measured(write_lines(elsewhere / "ends.jsonl", rows))


def test_what_is_wrong_is_named_counted_and_left_out(folder, measured):
    rows = [{"video": video(n), "prompt": PROMPTS[n], "score": s} for n, s in NUMBERED if n != 2]
    rows[0]["score"] = math.nan  # of video 0
    rows += [{"video": video(6), "prompt": "r", "score": 0.125},
             {"video": video(7), "prompt": "r", "score": 9},
             {"video": "x/other.mp4", "score": 1}, {"video": video(8), "prompt": "not s", "score": 1}]
    source = write_lines(folder / "scores.jsonl", rows)
    found, err, code = measured(source)
    wanted = expected(folder, [None if n in (0, 2, 7) else s for n, s in NUMBERED])
    counts = {"left_out": 3, "missing": 1, "not_finite": 1, "contradicted": 1, "other_rows": 2}
    same(found["predictions"][str(source)], wanted | counts)
    assert wanted["pairs"] == 3 and code == 1
    for said in ("1 without a finite number (row 1 x/v0.mp4)", f"1 without a score ({folder}/x/v2.mp4)",
                 "1 with another number than before (row 11 y/v7.mp4, as row 7)",
                 "2 rows about no video of the pair file, or another prompt (row 12 x/other.mp4, row 13 z/v8",
                 "; 3 of 6 pairs left out"):
        assert said in err
    # The same of a row a pair: one is missing, one is no number, one is said twice, once turned round.
    lines = rows_of_pairs(SCORES)
    lines = [*lines[1:], (lines[2][1], lines[2][0], "q", 1, 2), ("a", "b", "p", 1, 2)]
    lines[3] = (*lines[3][:4], "NA")
    (folder / "pairs.csv").write_text(as_csv(["video_a", "video_b", "prompt", "score_a", "score_b"], lines))
    found, err, code = measured(folder / "pairs.csv")
    assert found["predictions"][str(folder / "pairs.csv")] | counts | {"left_out": 3, "other_rows": 1} == (
        found["predictions"][str(folder / "pairs.csv")])
    assert "row 7 y/v4.mp4, as row 3" in err and "row 5 z/v6.mp4" in err and code == 1


@pytest.mark.parametrize(("text", "message"), [
    ("", "the file is empty"), ("[]", "no scores are in it"), ("video,score\n", "no scores are in it"),
    ('{"video": "x/v0.mp4", "score": "high"}\n{"video": "x/v2.mp4"}', "row 1: score is no number"),
    ("video,score\nx/v0.mp4,1\nx/v2.mp4,good\n", "row 3: score is no number"),
    ('{"x/v0.mp4": true}', "row 1: score is no number"), ("[7]", "row 1: not a JSON object"),
    ("video,score\nx/v0.mp4,1,2\n", "row 2: not 2 columns"), ("video,video,score\n", "a column stands twice"),
    ("id,score\n1,2\n", "no column is known to hold a video; it has id, score"),
    ('{"x/v0.mp4": 1, "x/v0.mp4": 2}', "row 1: not JSON"), ("\xff", "CSV|no scores"),
    ('{"x/v0.mp4": NaN, "y/v1.mp4": 1}', "no pair of .*pairs.jsonl has its scores"),
    ("video,score\nq.mp4,1\n", "1 rows about no video .*Its first row is about q.mp4, the first pair about")])
def test_a_file_that_cannot_be_used_is_named(text, message, folder, measured):
    (folder / "scores").write_text(text)
    with pytest.raises(DataError, match=f"{folder}/scores.*: .*{message}|{folder}/scores, {message}"):
        measured(folder / "scores")


def test_a_difference_is_of_the_same_pairs_drawn_together():
    """Of 10 pairs ours alone is right in 4, theirs alone in 1, and both or none in 5; 2 lack a score."""
    pairs = [Pair("p", "a", "b", "A") for _ in range(12)]
    ours = [1.0] * 4 + [-1.0] + [1.0] * 3 + [-1.0] * 2 + [None, 1.0]
    theirs = [-1.0] * 4 + [1.0] + [1.0] * 3 + [-1.0] * 2 + [1.0, None]
    found = difference(pairs, ours, theirs)
    chances = {}
    for one, other in product(range(11), repeat=2):
        if one + other <= 10:
            ways = comb(10, one) * comb(10 - one, other)
            chance = ways * 0.4**one * 0.1**other * 0.5 ** (10 - one - other)
            chances[one - other] = chances.get(one - other, 0) + chance
    ends, below = [], 0.0
    for value in sorted(chances):
        before, below = below, below + chances[value]
        ends += [value / 10 for share in (0.025, 0.975) if before <= share < below]
    assert found["pairs"] == 10 and found["accuracy"] == pytest.approx(3 / 10)
    assert found["intervals"]["accuracy"] == pytest.approx(tuple(ends))
    assert found == difference(pairs, ours, theirs)
    back = difference(pairs, theirs, ours)
    assert back["intervals"]["accuracy"] == pytest.approx(tuple(-end for end in ends[::-1]))
    assert difference(pairs, ours, [None] * 12) == {"pairs": 0, "intervals": {}}


def test_without_thinking_the_score_is_that_without_a_cot():
    pairs = [Pair("p", "a", "b", "A"), Pair("p", "a", "c", "B")]
    judged = {("a", "p"): {"score_no_cot": 1.5}, ("b", "p"): {"score_no_cot": 1.0}}
    judged["c", "p"] = {"error": "gone"}
    assert own_margins(pairs, judged) == [0.5, None]
    judged["a", "p"]["score"] = 3.0
    judged["b", "p"]["score"] = 5.0
    assert own_margins(pairs, judged) == [-2.0, None]


def test_a_model_is_compared_with_others_on_the_pairs_that_both_have(world_dir, tmp_path):
    """And its kept judgements, as the first of several files, say the same without it."""
    torch.manual_seed(0)
    model = DeScore.load(ROOT / "toy/backbone", device="cpu", video={"min_pixels": 4096, "max_pixels": 4096})
    model.has_head = True
    model.save(tmp_path / "model")
    lines = [json.loads(line) for line in (world_dir / "test_id.jsonl").read_text().splitlines()]
    other = write_lines(tmp_path / "other.jsonl", [
        {"video": line[f"video_{side}"], "score": (number + (side == "b")) % 3 / 2}
        for number, line in enumerate(lines) for side in "ab"][:-1])  # relative to the pair file
    words = ["infer.py", "--pairs", world_dir / "test_id.jsonl", "--json", "--predictions"]
    kept = tmp_path / "kept.jsonl"
    done = run(*words, other, "--model", tmp_path / "model", "--out", kept, "--max-new-tokens", 5,
               check=False)
    found = json.loads(done.stdout)
    assert done.returncode == 1 and "1 of 4 pairs left out" in done.stderr  # the last has one score
    ours = [json.loads(line) for line in kept.read_text().splitlines()[1:]]
    assert found["accuracy_no_cot"] == pytest.approx(plain.figures(lines, ours)["accuracy_no_cot"])
    theirs = [{**json.loads(line), "prompt": pair["prompt"]}
              for line, pair in zip(other.read_text().splitlines(), [line for line in lines for _ in "ab"])]
    (row,) = found["differences"]
    assert (row["of"], row["minus"], row["pairs"]) == (str(tmp_path / "model"), str(other), 3)
    for name in ("accuracy", "accuracy_ties"):
        one, two = (plain.figures(lines[:3], scores)[name] for scores in (ours, theirs))
        assert row[name] == pytest.approx(one - two)
        assert found["predictions"][str(other)][name] == pytest.approx(two)
        assert row["intervals"][name][0] <= row[name] <= row["intervals"][name][1]
    again = json.loads(run(*words, kept, other, check=False).stdout)
    assert again["differences"] == [{**row, "of": str(kept)}]
    text = run(*[word for word in words if word != "--json"], kept, other, check=False).stdout
    assert f"{kept} − {other}, on the same 3 pairs" in text
    assert re.search(rf"^accuracy +{re.escape(format(row['accuracy'], '+.4f'))}   \[", text, re.MULTILINE)


@pytest.mark.parametrize(("words", "message"), [
    (["a.mp4", "a cat", "--predictions", "s"], "--predictions has others'"),
    (["--pairs", "p", "--predictions", "s", "--out", "o"], "nothing is judged: --out, --report"),
    (["--pairs", "p", "--predictions", "s", "--report", "r.html"], "nothing is judged: --out, --report"),
    (["--pairs", "p", "--predictions", "s", "--think-at", "http://x"], "and --think-at need --model"),
    (["a.mp4", "a cat", "--model", ""], "argument --model: it is empty"),
    (["a.mp4", "a cat", "--think-at", ""], "argument --think-at: it is empty"),
    (["a.mp4", "a cat", "--think-at-model", ""], "argument --think-at-model: it is empty")])
def test_others_scores_go_with_pairs(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["infer.py", *words])
    with pytest.raises(SystemExit):
        infer.parse_args()
    assert message in capsys.readouterr().err
