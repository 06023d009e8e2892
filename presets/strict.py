"""An R that is harder to cheat than the paper's: R_f asks for three words of thought, and R_l counts
what says something. `--preset presets/strict.json` puts both in place.

A policy that is paid by the token would write blanks, rules and copies as gladly as thoughts.
"""

import html
import re
import unicodedata

import rl
from data import DIMENSIONS, TAGS, follows_format, overall_score, parse_cot

WORD = re.compile(r"[^\W\d_]+")  # a run of letters
MARKUP = re.compile("<[/!a-zA-Z][^<>]*>")
# Without a glyph, though not of category C: fillers, joiners, variation selectors, blank braille.
BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\ufe00-\ufe0f"
                   "\U000e0100-\U000e01ef]")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
SIGNS = re.compile(r"([^\w\s]|_)(?: ?(?:[^\w\s]|_))+")
REPEATED = re.compile(r"(\S{1,9}?|\b\w.{1,199}?)\1{2,}")
SENTENCE = re.compile(r"[^\n.!?。]*[\n.!?。]*")


def format_reward(text: str, n_tokens: int, gold: dict, processor) -> float:
    """R_f = 1 if a CoT keeps the format and its think block says something (`thought`), else 0."""
    return float(thought(text, processor.dimensions, processor.tags) != "")


def length_reward(text: str, n_tokens: int, gold: dict, processor, args) -> float:
    """R_l over the tokens of what the think block says, at most those of the CoT; 0 where the
    format is not kept."""
    said = thought(text, processor.dimensions, processor.tags)
    count = min(len(processor.encode(said)), n_tokens)
    return rl.length_reward(count, args.length_low, args.length_high, args.length_excess)


def thought(text: str, dimensions: dict[str, int] = DIMENSIONS, tags: tuple[str, str] = TAGS) -> str:
    """What a CoT says in its <think> block (`substance`), "" where it does not keep the format.

    Kept is what `data.follows_format` asks for, and more: three words or more in the block, not
    just the answer's; nothing but the scores in the answer; an overall_score, which goes from 1
    to 5, at most 1 off what the sub-scores imply."""
    if not follows_format(text, dimensions, tags):
        return ""
    cot = parse_cot(text, dimensions, tags)
    if len(cot) > 2:
        return ""
    implied = overall_score(cot["dimensional_scores"], dimensions)
    if implied and cot["overall_score"] and abs(cot["overall_score"] - implied) > 1:
        return ""
    _, block, _, answer, _ = re.split(rf"</?(?:{'|'.join(tags)})>", text)
    said = substance(block)
    words = set(WORD.findall(said.casefold()))
    answer_words = set(WORD.findall(answer.casefold()))
    return said if len(words) >= 3 and words - answer_words else ""


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
