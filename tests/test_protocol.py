"""What contradicts the protocol though each row can be read, and is counted and said: a video preferred to
itself, a pair with two labels or twice, test pairs that were trained on, a bad pair that is met again."""

import json
import os
from types import SimpleNamespace

import pytest
from conftest import ROOT, TOY_VIDEO
from launch import run

from data import DataError, Pairs
from support.formats import read_pairs
from support.ranks import ALONE
from support.run import Run, Skipped
from support.settings import RunArgs
from tools import check, convert
from tools.protocol import findings


@pytest.fixture
def folder(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.mp4").write_bytes(b"x")
    (tmp_path / "deep").mkdir()
    (tmp_path / "link.mp4").symlink_to(tmp_path / "a.mp4")
    return tmp_path


def write(path, *rows):
    """Rows of two videos, a preference and a prompt; None is a blank line."""
    lines = []
    for row in rows:
        if row is None:
            lines.append("\n")
            continue
        video_a, video_b, preference, prompt = row
        record = {"prompt": prompt, "video_a": video_a, "video_b": video_b, "preference": preference}
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))
    return path


AB = ("a.mp4", "b.mp4", "A", "p")


def test_rows_are_those_of_the_file(folder):
    path = write(folder / "p.jsonl", None, AB, None, None, ("c.mp4", "d.mp4", "B", "p"))
    assert [pair.row for pair in read_pairs(path)] == [2, 5]
    pair = read_pairs(path)[1]
    assert pair.winner_first().row == pair.masked().row == 5
    (folder / "p.csv").write_text("path_A,path_B,prompt,TA\n\na.mp4,b.mp4,\"two\nlines\",A\n,,,\n"
                                  "c.mp4,no.mp4,p,A\nc.mp4,d.mp4,p,B\n")
    pairs = read_pairs(folder / "p.csv")
    assert [pair.row for pair in pairs] == [3, 6]
    assert [(row["row"], row["reason"]) for row in pairs.left_out] == [(5, "missing")]


def test_the_row_of_another_file_is_not_written_down(folder, monkeypatch):
    path = write(folder / "p.jsonl", None, AB)
    monkeypatch.setattr("sys.argv", ["convert", str(path), str(folder / "out.jsonl")])
    convert.main()
    assert "row" not in json.loads((folder / "out.jsonl").read_text())
    record = json.loads(path.read_text()) | {"row": "mine"}
    path.write_text(json.dumps(record))
    assert read_pairs(path)[0].row == 1


@pytest.mark.parametrize("other", ["a.mp4", "./a.mp4", "deep/../a.mp4", "link.mp4"])
def test_a_video_preferred_to_itself_is_left_out_and_said(folder, other):
    path = write(folder / "p.jsonl", AB, ("a.mp4", other, "A", "p"), ("b.mp4", other, "B", "p"),
                 ("a.mp4", other, "tie", "p"))
    pairs = read_pairs(path)
    assert [pair.row for pair in pairs] == [1, 3, 4]  # a tie with itself is no contradiction
    assert "; 1 left out, a video preferred to itself: row 2 " in pairs.summary()
    (folder / "no.mp4").unlink(missing_ok=True)
    path = write(folder / "p.jsonl", AB, ("no.mp4", "no.mp4", "A", "p"))
    assert [row["reason"] for row in read_pairs(path).left_out] == ["missing"]


def test_a_pair_with_two_labels_is_said_however_it_is_spelt(folder):
    path = write(folder / "p.jsonl", AB, ("c.mp4", "d.mp4", "A", "p"), ("b.mp4", "a.mp4", "A", " p "),
                 ("d.mp4", "c.mp4", "B", "p"), ("a.mp4", "b.mp4", "B", "another"),
                 ("./link.mp4", "c.mp4", "tie", "x\ny"), ("c.mp4", "deep/../a.mp4", "B", "x y"))
    assert findings(read_pairs(path)) == [
        f"{path}: 2 pairs have more than one label: row 1 and 3, 6 and 7",
        f"{path}: 1 pairs stand there more than once: row 2 and 4"]
    assert findings(read_pairs(write(path, AB, ("a.mp4", "b.mp4", "B", "another")))) == []


def test_test_pairs_that_were_trained_on_are_said(folder, monkeypatch, capsys):
    train = write(folder / "train.jsonl", AB, ("c.mp4", "d.mp4", "tie", "p"))
    test = write(folder / "test.jsonl", None, ("b.mp4", "link.mp4", "B", "p "), ("a.mp4", "c.mp4", "A", "p"),
                 ("a.mp4", "b.mp4", "A", "another"))
    said = [f"{test}: 1 pairs are training pairs too, of {train}: row 2",
            f"{test}: 1 pairs share a video and its prompt with training pairs of {train}: row 3"]
    assert findings(read_pairs(test), read_pairs(train)) == said
    (same,) = findings(read_pairs(train), read_pairs(train))
    assert same == f"{train}: 2 pairs are training pairs too, of {train}: row 1, 2"
    monkeypatch.setattr("sys.argv", ["check", str(train), "--test", str(test)])
    with pytest.raises(SystemExit, match="1"):  # the videos are none
        check.main()
    assert set(said) < set(capsys.readouterr().out.splitlines())


def test_of_many_only_the_first_are_named(folder):
    rows = [("a.mp4", "b.mp4", "A", str(number % 7)) for number in range(14)]
    (line,) = findings(read_pairs(write(folder / "p.jsonl", *rows)))
    assert line.endswith("7 pairs stand there more than once: row 1 and 8, 2 and 9, 3 and 10, 4 and 11, "
                         "5 and 12, …")


# ------------------------------------------------------------------------------------------------------------
# A pair that cannot be read


BAD = {"row": 3, "videos": ["a.mp4", "b.mp4"], "prompts": ["p", "p"], "error": "a.mp4: not a video"}


def skipped_of(tmp_path, count=4, limit=1.0):
    pairs = Pairs(tmp_path / "pairs.jsonl")
    pairs += ["a pair"] * count
    return Skipped(tmp_path / "skipped.jsonl", pairs, limit)


def listed(tmp_path):
    return [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]


def test_a_bad_pair_counts_once_by_its_row(tmp_path):
    """With another error too, and two rows that say the same are two."""
    skipped = skipped_of(tmp_path)
    skipped.add([BAD, BAD | {"row": 4}, BAD | {"error": "a.mp4: no such file"}])
    skipped.add([BAD | {"error": "a.mp4: a prompt of 9 tokens, more than 5"}])
    assert listed(tmp_path) == skipped.records == [BAD, BAD | {"row": 4}]
    unnumbered = BAD | {"row": None}  # an item of one's own is known by its videos and prompts
    skipped.add([unnumbered, unnumbered | {"error": "another"}, unnumbered | {"prompts": ["q", "q"]}])
    assert listed(tmp_path)[2:] == [unnumbered, unnumbered | {"prompts": ["q", "q"]}]
    del skipped.records[2:]
    again = skipped_of(tmp_path)
    again.restore(skipped.records)
    again.add([BAD])
    assert listed(tmp_path) == [BAD, BAD | {"row": 4}]


@pytest.mark.parametrize(("count", "limit", "bad"), [(100, 0.29, 29), (100, 0.07, 7), (2000, 0.01, 20)])
def test_as_many_as_the_limit_says_are_allowed(tmp_path, count, limit, bad):
    skipped = skipped_of(tmp_path, count, limit)
    for _ in range(3):
        skipped.add([BAD | {"row": row} for row in range(1, bad + 1)])
    with pytest.raises(DataError, match=f"{bad + 1} of {count} pairs .*more than --max-skipped {limit} "):
        skipped.add([BAD | {"row": bad + 1}])


@pytest.mark.parametrize("is_changed", [False, True])
def test_what_a_checkpoint_skipped_counts_while_the_pairs_are_the_same(tmp_path, monkeypatch, is_changed):
    """The rows of another file say nothing of this one's; what is missing now is missing in any case."""
    monkeypatch.setattr("signal.signal", lambda *handler: None)
    going = Run(RunArgs(out=str(tmp_path), train="x", resume="insist"), "rl", ALONE)
    pairs = Pairs(tmp_path / "pairs.jsonl")
    pairs += ["a pair"] * 4
    pairs.left_out = [{"row": 6, "reason": "missing", "detail": "no.mp4"}]
    going.skipped = Skipped(tmp_path / "skipped.jsonl", pairs, 1.0)
    name = "the training pairs (x)"
    going.make_digests = lambda model: {name: "now"}
    before = {name: "before" if is_changed else "now"}
    was_missing = {"row": 9, "videos": ["is_here_now.mp4"], "error": "missing"}
    state = {"step": 1, "digests": before, "skipped": [was_missing, BAD]}
    newest = {"attach": lambda *what: None, "newest": lambda deciding: state}
    going.checkpoints = SimpleNamespace(folder=tmp_path, **newest)
    assert going.resume(None, None) == 1
    assert [record["row"] for record in listed(tmp_path)] == ([6] if is_changed else [6, 3])


def test_ranks_agree_on_each_test_set_before_the_first_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *handler: None)
    monkeypatch.setattr("support.run.evaluate", lambda *about: {})
    going = Run(RunArgs(out=str(tmp_path), train="x"), "rl", ALONE)
    asked = []
    going.ranks = SimpleNamespace(first=False, agree=lambda *about: asked.append(about))
    tests = {name: Pairs(tmp_path / name) for name in ("a", "b")}
    for step in (1, 2):
        going.evaluate(step, None, tests)
    assert asked == [({}, tmp_path / "a", []), ({}, tmp_path / "b", [])]


def test_a_run_counts_by_rows_and_says_what_contradicts_itself(world_dir, tmp_path):
    """A bad pair stands in two rows and is met in two epochs; the test set is the training file."""
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 100)
    good, *_ = (json.loads(line) for line in (world_dir / "train_cots.jsonl").read_text().splitlines())
    good |= {side: str(world_dir / good[side]) for side in ("video_a", "video_b")}
    good |= {"preference": "A"}
    bad = good | {"video_b": "broken.mp4", "prompt": "bad"}
    rows = [good, good | {"preference": "B"}, bad, bad, good | {"video_b": good["video_a"]}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    test = os.path.join(path.parent, ".", path.name)
    command = ["coldstart.py", "--model", ROOT / "toy/backbone", "--train", path, "--test", test,
               "--out", tmp_path / "out", "--epochs", 2, "--batch-size", 4, "--max-skipped", 0.5,
               "--max-new-tokens", 2, "--lora-rank", 4, "--workers", 0, *TOY_VIDEO]
    done = run(*command, "--eval-before", "false")
    assert "1 left out, a video preferred to itself: row 6" in done.stdout
    assert [record["row"] for record in listed(tmp_path / "out")] in ([4, 5], [5, 4])
    said = [f"warning: {path}: 1 pairs have more than one label: row 2 and 3",
            f"warning: {path}: 1 pairs stand there more than once: row 4 and 5",
            f"warning: {path}: 2 pairs are training pairs too, of {path}: row 2 and 3, 4 and 5"]
    for line in said:
        assert line in done.stderr.splitlines(), line
    assert done.stderr.splitlines().count(said[0]) == 2  # of what is trained on, and of the test set
    assert "1 left out, a video preferred to itself: row 6" in done.stderr  # of the test set
    judged = run("infer.py", "--pairs", path, "--model", tmp_path / "out", "--cot", "off", check=False)
    assert said[0].removeprefix("warning: ") in judged.stderr.splitlines()
