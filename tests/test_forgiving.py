"""One table of the forms in which scores are written, through all that reads them: what a model of ours
writes is read to the letter, an annotation or a reference as it is meant, and nothing is guessed."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DIMENSIONS, DataError, Pair, follows_format, parse_cot
from infer import measure
from presets import release
from presets.strict import thought
from rl import format_reward, quality_reward
from support import tables
from support.formats import read_pairs
from tools import annotate, pairs, report
from tools.filter import consistent
from tools.forgiving import plain_scores, read_annotation

SCORES = {"subject": 2, "dynamics": 1, "camera": "N/A", "environment": 2, "style": 0}
OVERALL = 3.5
THOUGHT = "<think>The ball isn't red, it rolls {slowly}.</think>"
JSON = json.dumps({"dimensional_scores": SCORES, "overall_score": OVERALL})
DRAFT = JSON.replace("2", "1")


def cot(answer=JSON):
    return f"{THOUGHT}\n<answer>\n{answer}\n</answer>"


def scored(**changes):
    """A CoT in which sub-scores, or the overall score, are written otherwise."""
    changed = {name: changes.get(name, value) for name, value in SCORES.items()}
    return cot(json.dumps({"dimensional_scores": changed, "overall_score": changes.get("overall", OVERALL)}))


# Read to the letter.
STRICT = {
    "as asked": cot(),
    "fenced": cot(f"```json\n{JSON}\n```"),
    "fence without a name": cot(f"```\n{JSON}\n```"),
    "quoted": scored(subject="2", dynamics="1", environment="2", style="0"),
    "one quoted": scored(style="0"),
    "as a whole float": scored(subject=2.0, style=0.0),
    "escaped slash": cot(JSON.replace("N/A", r"N\/A")),
    "more in the answer": cot(JSON[:-1] + ', "reasons": ["a", {"b": null}]}'),
}
# Read as it is meant, where it is an annotation.
FORGIVEN = {
    "comma at the end": cot(JSON[:-1] + ",}"),
    "escapes": cot(JSON.replace("subject", r"\u0073ubject").replace("2", r'"2\n"')[:-1] + ",}"),
    "comma within": cot(JSON.replace('"style": 0}', '"style": 0,\n}')),
    "another fence": cot(f"```JSON\n{JSON}\n```"), "json5": cot(f"```json5\n{JSON}\n```"),
    "text beside the fence": cot(f"Here you are:\n```json\n{JSON}\n```\nIt's done."),
    "text beside the JSON": cot(f"Here you are: {JSON} It's done."),
    "n/a": scored(camera="n/a"), "NA": scored(camera="NA"), "N.A.": scored(camera="N.A."),
    " N/A ": scored(camera=" N/A "), "None": scored(camera="None"), "null": scored(camera=None),
    "not applicable": scored(camera="Not applicable"), "not_applicable": scored(camera="not_applicable"),
    "N/A without quotes": cot(JSON.replace('"N/A"', "N/A")),
    "2.0 as text": scored(subject="2.0"), "blanks": scored(subject=" 2 "),
    "with a reason": scored(subject={"score": 2, "reason": "it's {red}"}, camera={"Score": None},
                            style={"reason": "x", "score": "0"}),
    "names": cot(JSON.replace("subject", " Subject ").replace("camera", "CAMERA")),
    "object": cot(JSON.replace("subject", "object")), "Object": cot(JSON.replace("subject", "Object")),
    "names of fields": cot(JSON.replace("dimensional_scores", "Dimensional Scores").replace(
        "overall_score", "overall-score")),
    "overall as text": scored(overall="3.5"), "overall with a reason": scored(overall={"score": 3.5}),
    "Python": cot(repr(json.loads(JSON)).replace("'N/A'", "None")),
    "curved quotes": cot(JSON.replace(' "', " “").replace('{"', "{“").replace('"', "”")),
    "no quotes": cot(JSON.replace('"', "")),
    "comments": cot(JSON.replace(", ", ", // it's so\n").replace("{", "{ /* 1 */ # x\n")),
    "a line's end in a text": cot(JSON[:-1] + ', "reason": "one\ntwo \\"three\\""}'),
    "no tags": f"It moves.\n{JSON}", "no tags, fenced": f"```json\n{JSON}\n```",
    "no answer tags": f"{THOUGHT}\n{JSON}", "no thought": f"{JSON}</answer>",
    "not closed": f"{THOUGHT}<answer>{JSON}",
    "tags in capitals": f"<THINK>{DRAFT}?</THINK><ANSWER>{JSON}</ANSWER>",
    "a draft before the answer": f"First {DRAFT}, no.\n<answer>\n```JSON\n{JSON}\n```\n</answer>",
    "a draft in the thought": f"<think>First {DRAFT}, no.</think>{JSON}",
    "twice the same": cot(f"{JSON}\n{JSON}"), "in a list": cot(f"[{JSON}]"),
    "another object": cot(f'{{"a": 1}} {JSON}'),
    "scores beside the overall": cot(json.dumps({**SCORES, "overall_score": OVERALL})),
}
# Read by nothing.
UNCLEAR = {
    "empty": "", "no JSON": cot("subject 2, dynamics 1"), "a thought that does not end": f"<think>{JSON} or",
    "a draft, and no answer": f"<think>{JSON}</think>", "cut off": cot()[:-30],
    "a draft, and an answer cut off": f"<think>{JSON}</think><answer>{JSON[:-30]}",
    "cut off behind the scores": cot(JSON[: JSON.index("}") + 1])[:-10] + "x",
    "two that differ": cot(f"{JSON} {JSON.replace('3.5', '3.6')}"),
    "two answers that differ": cot() + cot(JSON.replace("2", "1")),
    "a dimension left out": cot(JSON.replace(', "style": 0', "")),
    "another in its place": cot(JSON.replace('"style": 0', '"reason": "x"')),
    "one more": cot(JSON.replace('"style": 0', '"style": 0, "humour": 2')),
    "twice": cot(JSON.replace('"style": 0', '"style": 0, "style": 1')),
    "twice, in other letters": cot(JSON.replace('"style": 0', '"style": 0, "Style": 0')),
    "subject and object": cot(JSON.replace('"style": 0', '"style": 0, "object": 2')),
    "3": scored(style=3), "-1": scored(style=-1), "1.5": scored(style=1.5),

    "1.5 as text": scored(style="1.5"),
    "true": scored(style=True), "a word": scored(style="missed"), "of two": scored(style="0/2"),
    "no text": scored(style=""), "a dash": scored(camera="-"),

    "a list": scored(style=[0]), "NaN": scored(camera=float("nan")),
    "a reason alone": scored(style={"reason": "0"}),
    "a score within a score": scored(style={"score": {"score": 0}}),
    "Arabic digits": scored(subject="٢"), "overall 0": scored(overall=0), "overall 6": scored(overall="6"),
    "overall of five": scored(overall="4/5"), "overall true": scored(overall=True),
}
TABLE = [(name, text, STRICT) for name, text in STRICT.items()]
TABLE += [(name, text, FORGIVEN) for name, text in FORGIVEN.items()]
TABLE += [(name, text, UNCLEAR) for name, text in UNCLEAR.items()]
MEANT = {"dimensional_scores": SCORES, "overall_score": OVERALL}
OTHER = cot(json.dumps({"dimensional_scores": dict.fromkeys(DIMENSIONS, 0), "overall_score": 1.0}))


def plain_numbers(scores):
    """Whether sub-scores are what we keep: 2 and not "2", 2.0 or true."""
    return scores == SCORES and all(type(value) in (int, str) for value in scores.values())


@pytest.mark.parametrize(("name", "text", "kind"), TABLE, ids=[row[0] for row in TABLE])
def test_a_form_through_all_that_reads(name, text, kind):
    strict, forgiven = kind is STRICT, kind is not UNCLEAR
    read = parse_cot(text)
    assert (read is not None) == strict and follows_format(text) == strict == format_reward(text)
    assert quality_reward(text, SCORES) == float(strict)
    if strict:
        assert plain_numbers(read["dimensional_scores"]) and read["overall_score"] == OVERALL
        assert thought(text) or len(read) > 2  # the strict R allows nothing more in the answer
        assert release.format_reward(text, 1, SCORES) == release.quality_reward(text, 1, SCORES) == 1.0

    record = {"video": "a", "prompt": "p", "cot": text, "truncated": False, "score": 1.0}
    judged = {("a", "p"): record, ("b", "p"): record | {"video": "b", "cot": OTHER, "score": 0.0}}
    pair = Pair("p", "a", "b", "A", cot_a=text, cot_b=OTHER, scores_a=SCORES)
    figures = measure([pair], judged, DIMENSIONS)
    assert figures["quality"] == strict and figures["format_rate"] == (1 + strict) / 2
    assert figures["accuracy_reading"] == (1.0 if strict else 0.5)

    annotation = read_annotation(text)
    assert annotation == (MEANT if forgiven else None)
    assert not forgiven or plain_numbers(annotation["dimensional_scores"])
    assert consistent(pair) == ("kept" if forgiven else "an annotation that says nothing")
    scored_pair = pairs.ScoredPair("p", "a", "b", "A", cot_a=text, cot_b=OTHER, margin=1.0)
    used = pairs.use_of(scored_pair, 0.0, True, DIMENSIONS)
    assert used == ("kept" if forgiven else "with a CoT that has no sub-scores")
    assert not forgiven or plain_numbers(scored_pair.scores_a)


def test_annotation_keeps_a_cot_as_it_was_written_and_its_scores_as_plain_numbers(tmp_path):
    lines, answers = [], {}
    for video in "ab":
        (tmp_path / f"{video}.mp4").write_bytes(b"x")
    for number, (_, text, _) in enumerate(TABLE):
        line = {"prompt": str(number), "video_a": "a.mp4", "video_b": "b.mp4", "preference": "A"}
        lines.append(json.dumps(line) + "\n")
        answers[str(tmp_path / "a.mp4"), str(number)] = text
        answers[str(tmp_path / "b.mp4"), str(number)] = OTHER

    def write(keys, done):
        for key in keys:
            yield {"video": key[0], "prompt": key[1], "cot": answers[key]}

    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    annotate.annotate(tmp_path / "pairs.jsonl", tmp_path / "out.jsonl", write, {}, True)
    kept = {int(pair.prompt): pair for pair in read_pairs(tmp_path / "out.jsonl")}
    assert [number in kept for number in range(len(TABLE))] == [kind is not UNCLEAR for _, _, kind in TABLE]
    for number, pair in kept.items():
        assert pair.cot_a == TABLE[number][1] and plain_numbers(pair.scores_a)
    raw = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert plain_numbers(raw["scores_a"])


def test_pages_show_the_numbers(model, tmp_path):
    quoted = STRICT["quoted"]
    record = {"video": "a", "prompt": "p", "cot": quoted, "truncated": False, "score": 1.0}
    described = tables.describe(model, record)
    assert plain_numbers(described["sub_scores"]) and described["format_ok"]
    assert not tables.describe(model, record | {"cot": FORGIVEN["n/a"]})["format_ok"]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    rollouts = [{"cot": quoted}, {"cot": FORGIVEN["n/a"]}]
    line = {"step": 1, "video": "a", "prompt": "p", "reference": SCORES, "rollouts": rollouts}
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "held_out.jsonl").write_text("")
    _, thoughts = report.thoughts(report.RunFolder(tmp_path))
    first, second = thoughts[0]["thoughts"]
    assert plain_numbers(first["sub_scores"]) and second["sub_scores"] is None


REFERENCES = [
    ({"subject": "2", "dynamics": " 1", "camera": "n/a", "environment": 2.0, "style": "0"}, True),
    ({"Object": 2, "Dynamics": 1, "Camera": None, "Environment": {"score": "2"}, "Style": 0}, True),
    (SCORES | {"style": "zero"}, False), (SCORES | {"style": True}, False), (SCORES | {"humour": 2}, False)]


@pytest.mark.parametrize("kind", ["pair file", "the release's answer"])
def test_references_are_read_as_they_are_meant(tmp_path, kind):
    for video in "ab":
        (tmp_path / f"{video}.mp4").write_bytes(b"x")
    for written, is_clear in REFERENCES:
        path = tmp_path / "pairs.jsonl"
        if kind == "pair file":
            path.write_text(json.dumps({"prompt": "p", "video_a": "a.mp4", "video_b": "b.mp4",
                                        "preference": "B", "scores_a": written}))
        else:
            answer = json.dumps({"Video_1_scores": written, "gsb_result": "Video 2 is better"})[:-1] + ", }"
            path.write_text('videos,prompt,answer\n"[\'a.mp4\', \'b.mp4\']",p,"<answer>```JSON\n'
                            + answer.replace('"', '""') + '\n```</answer>"\n')
        if is_clear:
            (pair,) = read_pairs(path)
            assert plain_numbers(pair.scores_a) and pair.preference == "B"
        else:
            with pytest.raises(ValueError, match="row [12]: scores_a is not 0, 1, 2"):
                read_pairs(path)


def test_dimensions_and_tags_of_ones_own():
    dimensions, tags = {"größe": 2, "a.b": 1, "Object": 1}, ("reason", "verdict")
    text = "<Reason>x</Reason><Verdict>{'Größe': '2', 'A.B': null, 'object': {'score': 0},}</Verdict>"
    found = read_annotation(text, dimensions, tags)
    assert found == {"dimensional_scores": {"größe": 2, "a.b": "N/A", "Object": 0}, "overall_score": None}
    assert plain_scores({"A": 1, "a": 2}, {"A": 1, "a": 1}) == {"A": 1, "a": 2}  # both are exact


PIECES = ['{"', "{", "}", "[", "'", "“", ":", ",", "//", "/*", "#", "\\", *DIMENSIONS, "dimensional_scores",
          "<answer>", "</think>", "2", "null"]


@settings(max_examples=100, deadline=2000)
@given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
def test_any_text_is_read_or_not(text):
    found = read_annotation(text)
    assert found is None or set(found["dimensional_scores"]) == set(DIMENSIONS)


@pytest.mark.parametrize("text", ["{" * 50_000, '{"a":' * 10_000, "{/*" * 16_000, "{'" * 25_000,
                                  '{"' * 25_000, "<answer>" * 6000, '{"a":[' * 8000, "<think>" * 7000])
def test_huge_nonsense_takes_no_time(text):
    started = time.process_time()
    assert read_annotation(text) is None
    assert time.process_time() - started < 2


@pytest.mark.parametrize("overall", [10**400, 7, -1, True, "9"])
def test_an_overall_score_that_is_none_is_named_with_its_row(overall, world_dir, tmp_path):
    row = json.loads((world_dir / "train.jsonl").read_text().splitlines()[0]) | {"overall_a": overall}
    row |= {side: str(world_dir / row[side]) for side in ("video_a", "video_b")}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"pairs\.jsonl, row 1: overall_a is not a number from 1 to 5"):
        read_pairs(tmp_path / "pairs.jsonl")
