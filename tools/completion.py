"""A chat completion, read as a CoT in the format that the instruction asks for.

The thought of a reasoning model stands beside its answer: as reasoning_content, as reasoning, or as a part
of the content. It goes back between its tags.
"""

import json
import re

from data import TAGS

CUT_OFF = ("length", "max_tokens")  # finish reasons
BROKEN_OFF = ("abort", "error")  # as by vLLM where it ends
THOUGHTS = ("thinking", "reasoning")  # kinds of parts of a content


class Refused(Exception):
    """An endpoint has no answer to this question, but may have to others."""


class Unsound(ValueError):
    """A chat completion that cannot be counted on, and why."""


def read_completion(text: str, as_written: bool = False) -> dict:
    """The CoT of a chat completion, whether it is truncated and, where it says so, prompt_tokens, how many
    tokens its prompt had, and prompt_ids, which. Raises Refused if it holds no answer, Unsound if it
    did not come to its end, or its prompt_ids are none, and an error of some other kind if it is no chat
    completion.

    as_written: the content is all that the model wrote, and stays as it is; Refused where a part of it
    stands elsewhere, Unsound where it does not say how it ended."""
    body = json.loads(text)
    choices = body["choices"]
    # A choice is known by its index, wherever it stands.
    first = min(range(len(choices)), key=lambda place: index_of(choices[place], place))
    message = choices[first]["message"]
    finish = str(choices[first].get("finish_reason")).lower()
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    refusal = text_of(message.get("refusal")) or text_of([of_kind(part, "refusal") for part in parts])
    if refusal.strip() or finish == "content_filter":
        raise Refused(f"refused: {refusal.strip() or 'content_filter'}")
    if finish in BROKEN_OFF or (as_written and finish not in ("stop", *CUT_OFF)):
        raise Unsound(f"an answer whose finish_reason is {finish}")
    thought = text_of(message.get("reasoning_content")) or text_of(message.get("reasoning"))
    if not thought:
        thought = text_of([of_kind(part, kind) for part in parts for kind in THOUGHTS])
    said = text_of(content)
    truncated = finish in CUT_OFF
    if not said.strip() and not truncated:
        raise Refused("refused: an empty answer")
    if as_written and thought:
        raise Refused("the thought stands beside the answer: it is to be served without --reasoning-parser")
    cot = said if as_written else joined(thought, said)
    # JSON can hold half of a surrogate pair, which no file of text can.
    cot = cot.encode(errors="replace").decode()
    return {"cot": cot, "truncated": truncated} | prompt_of(body)


def prompt_of(body: dict) -> dict:
    """What a completion says of the prompt that it is to. Raises Unsound for ids that are none."""
    found = {}
    count = (body.get("usage") or {}).get("prompt_tokens")
    if isinstance(count, int):
        found["prompt_tokens"] = count
    ids = body.get("prompt_token_ids")
    if ids is not None:
        if not isinstance(ids, list) or not all(type(one) is int and 0 <= one < 2**31 for one in ids):
            raise Unsound("an answer whose prompt_token_ids are no token ids")
        found["prompt_ids"] = ids
    return found


def index_of(choice: dict, place: int) -> int:
    index = choice.get("index")
    return index if isinstance(index, int) else place


def of_kind(part, kind: str):
    """What a part of a content holds that is not its text, if it is of such a kind."""
    is_one = isinstance(part, dict) and part.get("type") == kind
    return part.get(kind, part.get("text")) if is_one else None


def text_of(content) -> str:
    """The text of a content: a string, a part, or a list of parts. An object that is no part is the
    answer itself."""
    if isinstance(content, list):
        return "".join(text_of(part) for part in content)
    if not isinstance(content, dict):
        return content if isinstance(content, str) else ""
    if content.get("type", "text") in (*THOUGHTS, "refusal"):
        return ""
    for name in ("text", "value", "content"):
        if name in content:
            return text_of(content[name])
    return "" if "type" in content else json.dumps(content, ensure_ascii=False)


def joined(thought: str, said: str, tags: tuple[str, str] = TAGS) -> str:
    """A thought, between its tags, before what was said behind it. One that already stands there
    remains as it is."""
    opening, closing = f"<{tags[0]}>", f"</{tags[0]}>"
    thought = thought.strip().removeprefix(opening).removesuffix(closing).strip()
    # Tags that it only speaks of would end it, or begin an answer.
    thought = re.sub(rf"</?({tags[0]}|{tags[1]})>", r"\1", thought)
    if closing in said and opening not in said:  # the endpoint has opened it
        return opening + thought + said
    without_empty = re.sub(rf"{opening}\s*{closing}", "", said).strip()
    if not thought or opening in without_empty:
        return said
    if not without_empty:  # cut off while it thought
        return opening + thought
    return f"{opening}{thought}{closing}\n{without_empty}"


def has_thought(cot: str, tags: tuple[str, str] = TAGS) -> bool:
    """Whether something stands between the tags of a thought."""
    found = re.search(rf"<{tags[0]}>(.*?)</{tags[0]}>", cot, re.DOTALL)
    return found is not None and found[1].strip() != ""
