"""Whatever a text from outside holds: an answer, or an error that says what is wrong. And no way to cheat."""

import json
import random
import time
import unicodedata

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from data import DIMENSIONS, DataError, Processor, follows_format, parse_cot
from model import DeScore
from presets.strict import substance, thought
from rl import Args, format_reward, length_reward, make_rewards, quality_reward
from support.filter import implied_overall
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


draw = random.Random(0)
THOUGHT = "subject: asked a red circle, seen a red circle, so 2\ndynamics: it should fall, but hovers, so 1"
LINE = THOUGHT.splitlines()[0]
SPACES = [chr(i) for i in range(0x3001) if chr(i).isspace()]
GLYPHLESS = [chr(i) for i in (
    0, 7, 0x1b, 0x7f, 0xad, 0x34f, 0x378, 0x61c, 0x115f, 0x1160, 0x17b4, 0x180e, 0x200b, 0x200c, 0x200d,
    0x200e, 0x202e, 0x2060, 0x2063, 0x2069, 0x2800, 0x3164, 0xe000, 0xfe0f, 0xfeff, 0xffa0, 0xfff9, 0x1d173,
    0xe0041, 0xe0100)]
MARKUP = ["<b></b>", "<br>", "</think >", "<!-- -->", "**", "__ ", "---\n", "***\n", "=", "| - | - |\n",
          "# \n## \n", "- \n* \n+ \n", "> ", "```\n```\n", "&nbsp;", "[ ](#) ", "\\n", "~~ ~~\n", "....",
          "?! ", "\u0301", "e\u0301\u0302 "]
CONFUSABLE = ["<th\u0456nk></th\u0456nk>", "\uff1cthink\uff1e\uff1c/think\uff1e", "\u2039answer\u203a",
              "<Think>", "< think >", "&#60;&#62;", "<think\u200b>", "\u27e8think\u27e9\u27e8/think\u27e9\n"]
NOTHING = {
    "space": [unit * 3000 for unit in SPACES] + ["".join(draw.choices(SPACES, k=3000))],
    "glyphless": [unit * 3000 for unit in GLYPHLESS] + ["".join(draw.choices(GLYPHLESS + SPACES, k=3000))],
    "markup": [unit * 1500 for unit in MARKUP] + [
        "".join(f"<h{i}></h{i}>" for i in range(800)), "".join(f'<a id="{i}">' for i in range(800)),
        "\n".join("-" * i for i in range(90)), "".join(draw.choices("-=*_#|~>+ ", k=3000))],
    "confusable": [unit * 800 for unit in CONFUSABLE],
    "number": ["9" * 3000, "1234567890" * 300, "0." + "3" * 3000, " ".join(map(str, range(3000))),
               "1e400 " * 500, "\n".join(map(str, range(3000))), "\u0663" * 3000,
               ", ".join(str(i / 7) for i in range(300))],
    "word": ["red " * 1500, "red\n" * 1500, "red, " * 1500, "a" * 3000, "Red\xad, RED; " * 500,
             "\n".join(" ".join(["red"] * i) for i in range(1, 90))],
}
COPIES = [
    f"{THOUGHT}\n" * 100, THOUGHT.replace("\n", ", ") * 50, "so it is. " * 400, "so it is, " * 400,
    "\n".join(f"line {i}: {LINE}" for i in range(300)), "; ".join(f"line {i}: {LINE}" for i in range(300)),
    "".join(f"{THOUGHT}\u200b{i}\n" for i in range(100)), "".join(f"{i}. {THOUGHT}\n" for i in range(100)),
    "\n".join("".join(draw.choice((c, c.upper(), c + "\xad")) for c in LINE) for _ in range(100)),
    "\n".join(LINE.replace("red", f"red{'!' * i}") for i in range(90)),
    "\n".join("".join(chr(ord(c) + 0xfee0) if c.isalpha() else c for c in LINE) for _ in range(99)),
    f"{json.dumps({'dimensional_scores': GOLD})}\n" * 100, (json.dumps(GOLD) + " ") * 100]


@pytest.mark.parametrize(("text", "said"), [
    ("&nbsp;&zwnj;a &amp; b", "a & b"), ("so --- it is", "so - it is"), ("a <b>c</b>", "a c"),
    ("it is 12.5 s, not 1920x1080", "it is 0 s, not 0x0"),
    ("वीडियो में लाल", None),  # Hindi, with marks
    ("วิดีโอ", None), ("un café", None),
    ("a\u0302\u0303\u0304\u0305\u0306\u0307", "\u1eab\u0304\u0305\u0306")])
def test_what_is_left_of_a_text(text, said):
    assert substance(text) == (text if said is None else said)


def named(**kinds):
    return [pytest.param(text, id=f"{kind} {i}") for kind in kinds for i, text in enumerate(kinds[kind])]


@pytest.fixture(scope="module")
def total():
    """R of a CoT whose scores are right, R_l being 0 up to 40 tokens more than `THOUGHT` has."""
    processor = Processor(AutoTokenizer.from_pretrained(ROOT / "toy/backbone"))
    low = len(processor.encode(THOUGHT)) + 40
    rewards = make_rewards(Args(length_low=low, length_high=low + 100), processor)

    def total(text):
        n = len(processor.encode(text))
        return round(sum(weight * function(text, n, GOLD) for weight, function in rewards.values()), 9)

    return total


def padded(filling):
    """An honest thought, and in it, before it or behind it what is to make it long."""
    return (THOUGHT + filling, f"{THOUGHT}\n{filling}\n", filling + THOUGHT, THOUGHT.replace("\n", filling))


@pytest.mark.parametrize("filling", named(**NOTHING))
def test_no_rollout_buys_reward_with_what_says_nothing(filling, total):
    assert total(cot(think="")) == 0.7 and total(cot(think=THOUGHT)) == 0.8
    for think in (filling, "." + filling, filling + "ok", f"so\n{filling}"):
        assert total(cot(think=think)) == 0.7
    for think in padded(filling):
        assert total(cot(think=think)) <= 0.8


@pytest.mark.parametrize("filling", named(copy=COPIES))
def test_no_rollout_buys_reward_by_saying_a_thing_again(filling, total):
    assert total(cot(think=filling)) <= 0.8
    once = len(substance(THOUGHT)) + len(substance(filling))
    for think in padded(filling):  # which glues the first and the last copy to other lines
        assert len(substance(think)) <= once + 2 * len(LINE) + 30


@pytest.mark.parametrize("blank", named(glyphless=GLYPHLESS))
def test_what_has_no_glyph_makes_no_word_longer(blank):
    assert substance(blank.join(THOUGHT)) == substance(THOUGHT)


def test_what_says_more_is_worth_more(total):
    more = [f"{word}: asked none, seen two {word}" for word in ("clouds", "roads", "trees", "birds", "kites")]
    found = [total(cot(think="\n".join([THOUGHT, *more[:count]]))) for count in range(6)]
    assert found == sorted(found) and 0.8 == found[0] < found[5] < 1


@pytest.mark.parametrize("answer", [
    '{%s"dimensional_scores": SCORES}' % (" " * 3000), '{"dimensional_scores": SCORES%s}' % ("\n" * 3000),
    '{"dimensional_scores": SCORES, "overall_score": 3.4%s}' % ("0" * 3000),
    '{"dimensional_scores": SCORES, "overall_score": 3%s4e-3000}' % ("0" * 3000),
    '{"dimensional_scores": SCORES, "why": "%s"}' % ("well, " * 500),
    '{"dimensional_scores": SCORES, "why": NaN}', '{"dimensional_scores": SCORES, "overall_score": 1}',
    '{"dimensional_scores": SCORES}' + "\t" * 3000, "\n" * 3000 + '{"dimensional_scores": SCORES}',
    '```json\n{"dimensional_scores": SCORES}\n%s```' % ("\n" * 3000)])
def test_no_answer_buys_reward_with_its_length(answer, total):
    answer = answer.replace("SCORES", json.dumps(GOLD))
    for think, most in (("", 0.7), (".", 0.7), (THOUGHT, 0.8)):
        assert total(f"<think>{think}</think><answer>{answer}</answer>") <= most
        assert total(f"{' ' * 3000}<think>{think}</think>\n<answer>{answer}</answer>\n") <= most


def test_without_the_format_no_length_is_rewarded(total):
    long = "\n".join(f"{word}: a thought of its own about {word}" for word in "abcdefghijklmnopqrstuvwxyz")
    assert total(cot(think=long)) > 0.9
    for text in (cot(think=long) + " Done.", cot(think=long).replace("</think>", ""), long):
        assert total(text) in (0.7, 0)


@pytest.mark.parametrize("text", [
    THOUGHT, "The prompt asks for a cat; the video shows one. It moves well, I think!",
    "subject: asked pink triangle, seen pink yes, triangle yes, so 2\ncamera: not asked, so N/A",
    "它看起来很对。颜色是红色。"])
def test_honest_prose_is_substance(text):
    assert substance(text) == unicodedata.normalize("NFKC", text).replace("1", "0").replace("2", "0")


@quick
@given(TEXTS)
def test_any_text_has_a_substance_once(text):
    assert len(substance(text)) <= len(unicodedata.normalize("NFKC", text))
    assert thought(text) == "" or follows_format(text)


@pytest.mark.parametrize("unit", ["a", "-=", "<a", "<!--", "1,", "- ", "\n", "a\u0301", "ab. ", "x y ", "é"])
def test_the_substance_of_anything_is_found_at_once(unit):
    started = time.process_time()
    substance(unit * (50_000 // len(unit)))
    substance("".join(draw.choices(unit + "q. ", k=50_000)))
    assert time.process_time() - started < 3


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
