"""The strict R (presets/strict.py): no way to buy reward with what says nothing."""

import json
import random
import time
import unicodedata

import pytest
from conftest import ROOT
from hypothesis import given
from test_fuzz import GOLD, TEXTS, cot, quick
from transformers import AutoTokenizer

from data import Processor, follows_format
from presets.strict import substance, thought
from rl import Args, make_rewards, quality_reward
from support.files import read_json

SCORED = {"subject": 2, "dynamics": 1, "camera": "N/A", "environment": 2, "style": 0}
ANSWER = ('{"dimensional_scores": {"subject": 2, "dynamics": 1, "camera": "N/A", "environment": 0, '
          '"style": 1}, "overall_score": 3.4}')


@pytest.mark.parametrize(("value", "kept"),
                         [(2.34, 1), (3, 1), (4.33, 1), (2.33, 0), (4.34, 0), (1, 0), (5, 0)])
def test_an_overall_score_may_be_a_step_off_the_sub_scores(value, kept):
    """Which imply 1 + 2 · (2 · 2 + 2 · 1 + 0 + 1) / 6 = 3.33."""
    text = "<think>it looks right</think><answer>" + ANSWER.replace("3.4", str(value)) + "</answer>"
    assert (thought(text) != "") == kept and quality_reward(text, SCORED) == 3 / 5


def test_where_nothing_is_asked_any_overall_score_goes():
    answer = json.dumps({"dimensional_scores": dict.fromkeys(SCORED, "N/A"), "overall_score": 5})
    assert thought(f"<think>it looks right</think><answer>{answer}</answer>") != ""


@pytest.mark.parametrize("more", ['"note": "x"', '"note": NaN', '"overall": 3.4', '"": 0'])
def test_the_strict_format_wants_the_scores_and_nothing_else(more):
    text = "<think>it looks right</think><answer>" + ANSWER[:-1] + f", {more}}}</answer>"
    assert thought(text) == ""


@pytest.mark.parametrize(("think", "kept"), [
    ("it looks right", 1), ("style: asked solid, seen solid", 1), ("它看起来，很对，是的", 1),
    ("looks right", 0), ("it-looks", 0), ("1 2 3 4", 0), ("so so so so so", 0), (ANSWER, 0),
    ("Subject: 1, Style: 2, Camera: N/A", 0), ("subject and style", 1)])
def test_the_strict_format_wants_three_words_that_do_not_only_repeat_the_answer(think, kept):
    assert (thought(f"<think>{think}</think><answer>{ANSWER}</answer>") != "") == kept


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
    functions = read_json(ROOT / "presets/strict.json")["rl"]["reward"]
    args = Args(length_low=low, length_high=low + 100, reward=functions)
    rewards = make_rewards(args, processor)

    def total(text):
        n = len(processor.encode(text))
        return round(sum(part.weight * part.function(text, n, GOLD) for part in rewards.values()), 9)

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
