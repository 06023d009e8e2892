"""Each figure that judges a model, calculated again from what was kept: by hand, and plainly (plain.py)."""

import json
import math
from math import comb
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from launch import run
from plain import BROKEN, GOOD, MIXED, POOR, SAYS, SILENT, TALKS, TOKENS, WEIGHTS, figures

from data import DIMENSIONS, TAGS, Pair
from infer import measure, report
from model import DeScore
from support import tables
from support.run import quantiles
from tools import probe

# Of each video that is judged: CoT, score, score without one, whether the CoT was cut off, reference.
JUDGED = {
    ("a1", "p"): (GOOD, 2.0, 0.5, False, [2, 2, 2, 2, 2]),
    ("b1", "p"): (MIXED, 1.0, 1.5, False, [2, 0, 1, 0, 1]),
    ("c1", "p"): (SAYS, 1.5, 1.0, False, [0, 0, 0, 0, 1]),
    ("d", "q"): (POOR, 0.25, 3.0, False, None),
    ("e", "q"): (GOOD, 0.0, -1.0, True, None),
    ("f", "r"): (MIXED, -1.0, 0.0, False, [2, 1, "N/A", 2, 0]),
    ("g", "r"): (GOOD, -1.0, 0.5, False, None),
    ("h", "s"): (POOR, 3.0, 2.0, False, [0, 0, 1, 1, 1]),
    ("i", "s"): (BROKEN, -2.0, 2.5, True, [1, 1, 1, 1, 1]),
    ("j", "t"): (TALKS, 0.5, 1.0, False, [2, 2, 2, 2, 0]),
    ("k", "t"): (SILENT, 0.75, 1.0, False, [1, 0, 1, 1, 2]),
    ("a1", "v"): (POOR, -0.5, 0.0, False, [0, 0, 2, 2, 2]),
    ("c1", "v"): (TALKS, 0.25, 0.75, False, [1, 1, 2, 2, 2]),
    ("n", "u"): (GOOD, 9.0, 9.0, True, [2, 2, 2, 2, 2]),  # its pairs are left out
    ("m", "u"): None,  # it cannot be read
}
# prompt, A, B, label, who made A, who made B.
PAIRS = [
    ("p", "a1", "b1", "A", "x", "y"),
    ("p", "b1", "c1", "B", "y", "x"),  # b1 once more
    ("q", "d", "e", "tie", "x", "y"),
    ("r", "f", "g", "B", "x", "x"),
    ("s", "h", "i", "A", "x", None),
    ("t", "j", "k", "tie", "y", "x"),
    ("u", "m", "n", "A", "x", "y"), ("u", "n", "m", "B", "x", "y"),
    ("v", "a1", "c1", "A", "z", "y"),
]
# Margins are 1, −0.5, 0.25, 0, 5, −0.25 and −0.75; without CoTs −1, 0.5, 4, −0.5, −0.5, 0 and −0.75.
KNOWN = {
    "pairs": 7,
    "unreadable": 2,
    "accuracy": 3 / 5,
    "accuracy_ties": 5 / 7,  # within 0.25
    "accuracy_no_cot": 1 / 5,
    "accuracy_ties_no_cot": 2 / 7,  # within 0
    "accuracy_reading": (1 + 1 + 1 + 0.5 + 0) / 5,
    "quality": (1 + 0.2 + 0.8 + 1 + 0.8 + 0 + 0 + 0.8 + 0.6 + 0.4) / 10,
    "format_rate": 9 / 13,
    "truncated": 2 / 13,
    "score_mean": 4.75 / 13,
    "score_std": math.sqrt(23.4375 / 13 - (4.75 / 13) ** 2),
    "generators": {
        "x / x": {"pairs": 1, "accuracy": 0, "accuracy_ties": 0, "accuracy_no_cot": 1,
                  "accuracy_ties_no_cot": 1},
        "x / y": {"pairs": 4, "accuracy": 1, "accuracy_ties": 1, "accuracy_no_cot": 0,
                  "accuracy_ties_no_cot": 2 / 4},
        "y / z": {"pairs": 1, "accuracy": 0, "accuracy_ties": 0, "accuracy_no_cot": 0,
                  "accuracy_ties_no_cot": 0},
    },
}
NO_COT = {"accuracy_no_cot", "accuracy_ties_no_cot"}
WITH_INTERVAL = {"accuracy", "accuracy_ties"} | NO_COT


def by_hand():
    """The pairs, as records of a file and of the project, and the judgements."""
    lines = []
    judged = {}
    for (video, prompt), found in JUDGED.items():
        record = {"video": video, "prompt": prompt}
        if found is None:
            judged[video, prompt] = record | {"error": "broken"}
        else:
            cot, score, score_no_cot, truncated, _ = found
            judged[video, prompt] = record | {"cot": cot, "score": score, "score_no_cot": score_no_cot,
                                              "truncated": truncated}
    for prompt, a, b, label, model_a, model_b in PAIRS:
        line = {"prompt": prompt, "video_a": a, "video_b": b, "preference": label, "model_a": model_a,
                "model_b": model_b}
        for side, video in (("a", a), ("b", b)):
            reference = (JUDGED[video, prompt] or [None])[-1]
            line[f"scores_{side}"] = reference and dict(zip(WEIGHTS, reference))
        lines.append(line)
    return lines, [Pair(**line) for line in lines], judged


def close(found, expected):
    """The same figures, and no other, those of each two generators included."""
    found, expected = dict(found), dict(expected)
    rows, wanted = found.pop("generators"), expected.pop("generators")
    assert list(rows) == list(wanted)
    for name, row in rows.items():
        assert row == pytest.approx(wanted[name]), name
    assert found == pytest.approx(expected)


def test_every_figure_of_a_table_is_known():
    lines, pairs, judged = by_hand()
    found = report(pairs, judged, DIMENSIONS)
    text = tables.show_report(found).splitlines()
    ends = found.pop("intervals")
    close(found, KNOWN)
    records = [record for record in judged.values() if "error" not in record]
    close(figures(lines, records), KNOWN)  # so that the plain ones are known to be right
    assert set(ends) == WITH_INTERVAL
    del found["pairs"], found["generators"]
    assert measure(pairs, judged, DIMENSIONS) == found
    for record in records:  # of several thoughts; a spread is no judgement
        record["score_std"] = 0.5
    assert measure(pairs, judged, DIMENSIONS) == found
    low, high = ends["accuracy"]
    assert f"accuracy                 0.6000   [{low:.4f}, {high:.4f}]" in text
    assert "score_std                1.2920" in text and "unreadable               2" in text
    assert "x / y: 4 pairs, accuracy 1.0000, accuracy_ties 1.0000, accuracy_no_cot 0.0000, " \
           "accuracy_ties_no_cot 0.5000" in text


def test_without_cots_and_without_references_their_figures_are_not_there():
    _, pairs, judged = by_hand()
    for pair in pairs:
        pair.scores_a = pair.scores_b = None
    assert set(measure(pairs, judged, DIMENSIONS)) == {*KNOWN} - {"pairs", "generators", "quality"}
    for record in judged.values():
        record.pop("cot", None)
        record.pop("score", None)
    found = measure(pairs, judged, DIMENSIONS)
    assert found == pytest.approx({name: KNOWN[name] for name in {"unreadable"} | NO_COT})


def ends_of(chances):
    """Between which values 95 % lie: (value, chance) of all, rising."""
    ends = []
    for share in (0.025, 0.975):
        below = 0.0
        for value, chance in chances:
            below += chance
            if below > share:
                ends.append(value)
                break
    return tuple(ends)


def binomial(n, p):
    return [comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]


def intervals_of(rows):
    """The intervals of pairs: label, margin, margin without CoTs."""
    pairs = []
    judged = {}
    for number, (label, margin, no_cot) in enumerate(rows):
        pairs.append(Pair(f"{number}", "a", "b", label))
        for video, sign in (("a", 0.5), ("b", -0.5)):
            record = {"video": video, "prompt": f"{number}", "score": sign * margin}
            judged[video, f"{number}"] = record | {"score_no_cot": sign * no_cot}
    return report(pairs, judged, DIMENSIONS)["intervals"]


def test_an_interval_holds_95_percent_of_what_other_draws_of_the_pairs_would_say():
    """Six of ten right, and four: binomial. The nearest numbers of pairs lie three standard errors away."""
    found = intervals_of([("A", 1.0 if n < 6 else -1.0, -1.0 if n < 6 else 1.0) for n in range(10)])
    for name, share in (("", 0.6), ("_no_cot", 0.4)):
        expected = ends_of([(k / 10, chance) for k, chance in enumerate(binomial(10, share))])
        assert found["accuracy" + name] == pytest.approx(expected)
        assert found["accuracy_ties" + name] == pytest.approx(expected)
    assert found["accuracy"] == pytest.approx((0.3, 0.9))


def test_each_draw_has_its_own_threshold_and_one_of_ties_alone_no_accuracy():
    """Ties lie further apart than what is decided: either the ones are right or the others."""
    found = intervals_of([("tie", 2.0, 0.0) if n < 5 else ("B", -1.0, 1.0) for n in range(11)])
    chances = {}
    for k, chance in enumerate(binomial(11, 5 / 11)):
        right = max(k, 11 - k) / 11
        chances[right] = chances.get(right, 0) + chance
    assert found["accuracy_ties"] == pytest.approx(ends_of(sorted(chances.items())))
    found = intervals_of([("tie", 0.0, 0.0), ("A", 1.0, -1.0)])  # a draw in four has the tie twice
    assert found["accuracy"] == (1.0, 1.0) and found["accuracy_no_cot"] == (0.0, 0.0)
    assert found["accuracy_ties_no_cot"] == (0.0, 1.0)


def test_a_scale_has_101_quantiles_with_straight_lines_between_the_scores():
    found = quantiles([3.0, 0.0, 1.00004])
    assert len(found) == 101 and (found[0], found[50], found[100]) == (0.0, 1.0, 3.0)
    assert (found[25], found[1], found[75], found[99]) == (0.5, 0.02, 2.0, 2.96)


def test_what_is_said_of_a_video_follows_from_its_record():
    _, _, judged = by_hand()
    processor = SimpleNamespace(dimensions=DIMENSIONS, tags=TAGS)
    model = SimpleNamespace(processor=processor, info={"score_mean": 0.5, "score_std": 2.0})
    for (video, prompt), (sub_scores, overall, form) in {
            ("c1", "p"): ([0, 0, 0, 0, 0], 4.9, True), ("j", "t"): ([1, 1, 1, 1, 1], None, False),
            ("i", "s"): (None, None, False)}.items():
        record = judged[video, prompt]
        own = {"standardised": (record["score"] - 0.5) / 2, "format_ok": form, "overall_score": overall,
               "sub_scores": sub_scores and dict(zip(WEIGHTS, sub_scores))}
        assert tables.describe(model, record) == record | own
    del record["cot"]
    assert tables.describe(model, record) == {"video": "i", "prompt": "s", "cot": None, "score": 2.5}


# ------------------------------------------------------------------------------------------------------------
# What infer.py prints


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorer") / "model"
    torch.manual_seed(0)
    model = DeScore.load(ROOT / "toy/backbone", device="cpu", video={"min_pixels": 4096, "max_pixels": 4096})
    model.has_head = True
    model.save(folder)
    return folder


def test_infer_prints_the_figures_of_what_it_keeps(world_dir, scorer, tmp_path):
    """Of a file in which videos stand twice, one cannot be read, and another's partner."""
    lines = []
    for line in (world_dir / "train.jsonl").read_text().splitlines()[:8]:
        pair = json.loads(line)
        lines.append(pair | {name: str(world_dir / pair[name]) for name in ("video_a", "video_b")})
    swapped = {}
    for one, other in ("ab", "ba"):
        for name in ("video", "scores", "model"):
            swapped[f"{name}_{one}"] = lines[0][f"{name}_{other}"]
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 100)
    lines += [lines[0] | swapped | {"preference": "tie"}, lines[1] | {"model_a": None}]
    lines[2]["video_b"] = str(tmp_path / "broken.mp4")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["--pairs", tmp_path / "pairs.jsonl", "--model", scorer, "--temperature", 1,
               "--max-new-tokens", TOKENS, "--json", "--out"]
    for mode, names in (("on", {*KNOWN}), ("off", {"pairs", "unreadable", "generators", *NO_COT})):
        done = run(ROOT / "tests/plain.py", "infer", *command, tmp_path / mode, "--cot", mode, check=False)
        assert done.returncode == 1 and "left out: " in done.stderr
        printed = json.loads(done.stdout)
        records = [json.loads(line) for line in (tmp_path / mode).read_text().splitlines()[1:]]
        expected = figures(lines, records)
        ends = printed.pop("intervals")
        assert set(printed) == names
        close(printed, expected)
        assert set(ends) == WITH_INTERVAL & set(expected)
        assert (expected["pairs"], expected["unreadable"], len(records)) == (9, 1, 15)
    judged = [json.loads(line) for line in (tmp_path / "on").read_text().splitlines()[1:]]
    assert len({record["cot"] for record in judged}) > 3  # of which some say something, and others do not


# ------------------------------------------------------------------------------------------------------------
# What the probe prints


def probed(values, prompts=None, **more):
    """Figures of one pair a prompt, A preferred; the CoT of the other video changes scores to `values`."""
    records = {}
    pairs = []
    for number, (own, changed) in enumerate(values):
        prompt = prompts[number] if prompts else f"{number}"
        pairs.append(Pair(prompt, f"a{number}", f"b{number}", "A"))
        for video, was, now in zip("ab", own, changed):
            record = {"prompt": prompt, "own": was - 7.0, "cot_own": was, "cot_of_pair": now, "variance": was}
            records[f"{video}{number}", prompt] = record
    return probe.figures(pairs, records, SimpleNamespace(info=more), 3)


def test_a_score_falls_where_it_falls_by_more_than_rounding():
    """In standard deviations of the scores, here 2: by 0.003 one falls, by 0.001 none; none that rises."""
    found = probed([((4.0, 0.0), (3.997, 0.003)), ((4.0, 0.0), (3.999, 1.0))])
    row = found["rows"]["cot_of_pair"]
    assert found["std"] == 2 and row["falls"]["mean"] == 1 / 4 and row["falls"]["n"] == 4
    assert row["change"]["mean"] == pytest.approx((-0.0015 + 0.0015 - 0.0005 + 0.5) / 4)
    # The variances are 4, 0, 4 and 0: of their mean the root, in standard deviations.
    assert found["spread"]["mean"] == pytest.approx(math.sqrt(2) / 2)
    assert (found["spread"]["samples"], found["spread"]["n"]) == (3, 4)
    text = probe.show(found | {"scores_false_in_thought": 3})
    assert "behind" not in text and "4 videos of 2 pairs" in text and "of the scores, 2, of the" in text
    assert "the CoT that of the pair's other video" in text and "3 thoughts about a video: 0.71" in text


def test_prompts_with_many_videos_weigh_more_in_every_draw():
    """Five prompts have a pair each, whose scores fall; five have four pairs, whose scores stay."""
    values = []
    prompts = []
    for number in range(5):
        values.append(((1.0, 0.0), (0.0, -1.0)))
        prompts.append(f"falls {number}")
        values += [((1.0, 0.0), (1.0, 0.0))] * 4
        prompts += [f"stays {number}"] * 4
    found = probed(values, prompts)["rows"]["cot_of_pair"]["falls"]
    chances = [(k / (k + 4 * (10 - k)), chance) for k, chance in enumerate(binomial(10, 0.5))]
    assert found["mean"] == 1 / 5 and found["interval"] == pytest.approx(ends_of(chances))
