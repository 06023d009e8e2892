"""Whatever a text from outside holds: an answer, or an error that says what is wrong. And no way to cheat."""

import json
import time

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from data import DIMENSIONS, DataError, follows_format, implied_overall, parse_cot
from model import DeScore
from rl import format_reward, length_reward, quality_reward
from support.formats import read_pairs

quick = settings(max_examples=150, deadline=2000, suppress_health_check=list(HealthCheck))

GOLD = dict(zip(DIMENSIONS, (2, 1, "N/A", 0, 2)))
SCORES = st.fixed_dictionaries(dict.fromkeys(DIMENSIONS, st.sampled_from([0, 1, 2, "N/A"])))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    | st.sampled_from([0, 1, 2, "2", "N/A", *DIMENSIONS]),
    lambda inner: st.lists(inner) | st.dictionaries(
        st.sampled_from([*DIMENSIONS, "dimensional_scores", "overall_score"]) | st.text(), inner),
    max_leaves=12)
PIECES = st.sampled_from([
    "<think>", "</think>", "<answer>", "</answer>", "```json", "```", "{", "}", "[", '"', ":", ",",
    "dimensional_scores", *DIMENSIONS, "0", "2", "NaN", "Infinity", "N/A", " ", "\n", "\u2028", "é"])
TEXTS = (st.text() | st.lists(PIECES, max_size=40).map("".join) | JSON.map(json.dumps)
         | JSON.map(lambda value: f"<think>x</think><answer>{json.dumps(value)}</answer>"))


def cot(scores=None, think="it looks right", **more):
    answer = json.dumps({"dimensional_scores": GOLD if scores is None else scores} | more)
    return f"<think>{think}</think><answer>{answer}</answer>"


@quick
@given(TEXTS)
def test_any_text_has_rewards_in_range(text):
    assert format_reward(text) in (0.0, 1.0) and 0 <= quality_reward(text, GOLD) <= 1
    overall = implied_overall(text)
    assert overall is None or 1 <= overall <= 5
    found = parse_cot(text)
    assert found is None or (set(found["dimensional_scores"]) == set(DIMENSIONS)
                             and set(found["dimensional_scores"].values()) <= {0, 1, 2, "N/A"})


@quick
@given(SCORES, st.text().filter(lambda text: "<" not in text))
def test_what_keeps_the_format_is_read_as_it_was_meant(scores, think):
    text = cot(scores, "it looks right\n" + think)
    assert follows_format(text) and parse_cot(text)["dimensional_scores"] == scores


@given(st.integers(0, 10**9), st.integers(0, 10**4), st.integers(1, 10**4), st.none() | st.integers(0, 10**9))
def test_the_length_reward_stays_in_range(n, low, width, more):
    excess = None if more is None else low + width + more
    assert 0 <= length_reward(n, low, low + width, excess) <= 1


@pytest.mark.parametrize("text",
                         ["[" * 10**6, "<answer>" * 10**5, "</answer>" * 10**5, "\n" * 10**6 + "<answer>",
                          "<answer>```" + " " * 10**6, "<think>" + "</think>" * 10**5,
                          "<answer>" + "[" * 10**6 + "</answer>", "<answer>" + "9" * 10**6 + "</answer>",
                          '<answer>{"a":' * 10**4 + "</answer>"])
def test_huge_nonsense_takes_no_time(text):
    started = time.process_time()
    assert parse_cot(text) is None and not follows_format(text)
    assert time.process_time() - started < 2


GOOD, OTHER = cot(), cot(dict.fromkeys(DIMENSIONS, 2))


@pytest.mark.parametrize("text", [
    GOOD + OTHER, OTHER + GOOD, GOOD + "<answer></answer>",  # a second answer, to be right at least once
    "<answer>" + GOOD, GOOD + "</answer>", GOOD.replace("</think>", "</think></think>"),  # tags too many
    GOOD.replace("<think>", "").replace("</think>", ""), GOOD.replace("it looks right", " \n "),  # no thought
    "So: " + GOOD, GOOD + " Done.", GOOD.replace("</think>", "</think> so "),  # text outside the blocks
    GOOD.split("</think>")[1] + GOOD.split("</think>")[0] + "</think>",  # the wrong way round
    GOOD.replace('"subject": 2', '"subject": 2, "subject": 0'),  # one dimension, two scores
    GOOD.replace('"subject": 2', '"subject": [0, 1, 2]'), GOOD.replace('"subject": 2', '"subject": "0|1|2"'),
    GOOD.replace('"subject": 2', '"subject": true'), GOOD.replace('"subject": 2', '"subject": 2, "extra": 2'),
    GOOD.replace('"subject": 2', '"subject": NaN'),
    GOOD.replace('"subject": 2', '"subject": 1e0, "subject": 2'),
    cot(overall_score=9), cot(overall_score="5"), cot(overall_score=float("inf")),
])
def test_no_trick_earns_the_format_reward(text):
    assert format_reward(GOOD) == 1 and format_reward(text) == 0


@pytest.mark.parametrize("text",
                         [GOOD + OTHER, OTHER + GOOD,
                          GOOD.replace('"subject": 2', '"subject": 2, "subject": 0'),
                          GOOD.replace('"subject": 2', '"subject": [0, 1, 2]'),
                          GOOD.replace('"subject": 2', '"subject": 2, "Subject": 0')])
def test_no_trick_earns_the_quality_reward(text):
    assert quality_reward(GOOD, GOLD) == 1 and quality_reward(text, GOLD) == 0


def test_the_example_of_the_instruction_earns_only_what_it_says():
    from data import INSTRUCTION

    example = INSTRUCTION[INSTRUCTION.index("{"): INSTRUCTION.rindex("}") + 1]
    text = f"<think>copied</think><answer>{example}</answer>"
    truth = dict.fromkeys(DIMENSIONS, 0)
    zeros = list(json.loads(example)["dimensional_scores"].values()).count(0)
    assert quality_reward(text, truth) == zeros / 5


@quick
@given(TEXTS | st.binary() | st.lists(st.dictionaries(
    st.sampled_from(["prompt", "video_a", "video_b", "preference", "cot_a", "scores_a"]), JSON)).map(
        lambda rows: "\n".join(map(json.dumps, rows)))
       | st.lists(st.lists(st.text() | st.sampled_from(["A", "same", "TA", "['a', 'b']"]), min_size=3,
                           max_size=5)).map(
           lambda rows: "path_A,path_B,prompt,TA\n" + "\n".join(",".join(row) for row in rows))
       | TEXTS.map(lambda text: 'videos,GSB,prompt\n"' + text.replace('"', '""') + '",A,x'))
def test_any_pair_file_is_read_or_refused_by_name(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        assert len(read_pairs(path)) > 0
    except DataError as error:
        assert str(path) in str(error)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = DeScore.load(ROOT / "toy/backbone", device="cpu")
    model.set_trainable(2)
    folder = tmp_path_factory.mktemp("saved")
    model.save(folder / "model")
    return folder / "model"


def copy_with(saved, folder, name, content):
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    info = json.loads((saved / "descore.json").read_text())
    if name != "descore.json":
        (folder / "descore.json").write_text(json.dumps(info | {"backbone": str(ROOT / "toy/backbone")}))


@pytest.mark.parametrize("name", ["descore.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "nonsense", "shape", "empty"])
def test_a_damaged_model_is_refused_by_name(name, damage, saved, tmp_path):
    content = (saved / name).read_bytes()
    if damage == "shape":
        save_file({key: tensor.flatten()[:1] for key, tensor in load_file(saved / name).items()},
                  tmp_path / "x")
        content = (tmp_path / "x").read_bytes()
        (tmp_path / "x").unlink()
    content = {"missing": None, "truncated": content[:-9], "nonsense": b"\x00" * 99, "shape": content,
               "empty": b""}[damage]
    copy_with(saved, tmp_path, name, content)
    with pytest.raises(DataError, match=str(tmp_path)):
        DeScore.load(tmp_path)


@pytest.mark.parametrize("content",
                         ["", "[]", "{", "{}", "nul", '{"backbone": 3}', '{"backbone": "x", "video": 5}',
                          '{"video": []}', '{"instruction": 7}', '{"dimensions": ["subject"]}',
                          '{"dimensions": {}}', '{"dimensions": {"subject": "2"}}',
                          '{"dimensions": {"subject": 0}}',
                          json.dumps({"backbone": str(ROOT / "toy/backbone"), "video": {"fps": "fast"}})])
def test_damaged_settings_are_refused_by_name(content, saved, tmp_path):
    copy_with(saved, tmp_path, "descore.json", content.encode())
    with pytest.raises(DataError, match=str(tmp_path)):
        DeScore.load(tmp_path)
