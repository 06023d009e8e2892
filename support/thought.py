"""What a CoT says before its answer: whether it keeps the format (R_f), and how much it says (R_l).

A policy that is paid by the token would write blanks, rules and copies as gladly as thoughts; what
says nothing is not counted.
"""

import html
import re
import unicodedata
from functools import lru_cache

from data import DIMENSIONS, overall_score, parse_cot

BLOCKS = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
TAG = re.compile(r"</?(?:think|answer)>")
WORD = re.compile(r"[^\W\d_]+")  # a run of letters
MARKUP = re.compile("<[/!a-zA-Z][^<>]*>")
# Without a glyph, though not of category C: fillers, joiners, variation selectors, blank braille.
BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\ufe00-\ufe0f"
                   "\U000e0100-\U000e01ef]")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
SIGNS = re.compile(r"([^\w\s]|_)(?: ?(?:[^\w\s]|_))+")
REPEATED = re.compile(r"(\S{1,9}?|\b\w.{1,199}?)\1{2,}")
SENTENCE = re.compile(r"[^\n.!?。]*[\n.!?。]*")


def thought(text: str, dimensions: dict[str, int] = DIMENSIONS) -> str:
    """What a CoT says in its <think> block (`substance`), "" where it does not keep the format.

    Kept is: one <think> block of three words or more, not just the answer's, then one <answer>
    block that `parse_cot` accepts and that holds nothing else; only white space around them, no
    further tag. An overall_score, which goes from 1 to 5, may be 1 off what the sub-scores imply."""
    return found(text, tuple(dimensions.items()))


@lru_cache(4096)  # a rollout is asked twice, for R_f and for R_l
def found(text: str, items: tuple) -> str:
    """`thought` for the items of the dimensions."""
    dimensions = dict(items)
    match = BLOCKS.fullmatch(text) if len(TAG.findall(text)) == 4 else None
    cot = parse_cot(text, dimensions) if match else None
    if cot is None or len(cot) > 2:
        return ""
    implied = overall_score(cot["dimensional_scores"], dimensions)
    if implied and cot["overall_score"] and abs(cot["overall_score"] - implied) > 1:
        return ""
    said = substance(match[1])
    words, answer = (set(WORD.findall(block.casefold())) for block in (said, match[2]))
    return said if len(words) >= 3 and words - answer else ""


def follows_format(text: str, dimensions: dict[str, int] = DIMENSIONS) -> bool:
    """Whether a CoT keeps the format exactly, as `thought` says."""
    return thought(text, dimensions) != ""


def substance(text: str) -> str:
    """A text without what says nothing, else as it is. White space, however much, is one space or
    one end of a line, a number one digit, a run of signs its first; markup and characters without
    a glyph are left out, and so is what stands three times in a row but for once, and a sentence
    or line that stands above, whatever its numbers, signs and case."""
    text = MARKUP.sub("", unicodedata.normalize("NFKC", html.unescape(text)))
    text = BLANK.sub("", "".join(filter(is_seen, text)))
    lines = (" ".join(line.split()) for line in text.splitlines())
    text = SIGNS.sub(first_sign, NUMBER.sub("0", "\n".join(filter(None, lines))))
    while text != (text := REPEATED.sub(r"\1", text)):
        pass  # what is left may stand there three times as well
    kept, said = [], {""}
    for sentence in SENTENCE.findall(text):
        letters = "".join(filter(str.isalpha, sentence.casefold()))
        if letters not in said:
            said.add(letters)
            kept.append(sentence)
    return "".join(kept).strip()


def first_sign(run: re.Match) -> str:
    """The first of a run of signs, or three where they are marks, such as vowel signs, which belong
    to letters."""
    marks = any(unicodedata.category(character)[0] == "M" for character in run[0])
    return run[0][:3] if marks else run[1]


def is_seen(character: str) -> bool:
    """Whether it is white space or has a glyph: not a control, format or unassigned character."""
    return character.isspace() or unicodedata.category(character)[0] != "C"
