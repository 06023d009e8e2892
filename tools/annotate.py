"""Let a model write a CoT for every video of a pair file: one here, or one behind an endpoint.

    python -m tools.annotate PAIRS OUT --model Qwen/Qwen3-VL-8B-Instruct
    python -m tools.annotate PAIRS OUT --scores --api https://HOST/v1 --api-model NAME
    python -m tools.annotate PAIRS OUT --scores --together --api https://HOST/v1 --api-model NAME

Each (video, prompt) is asked about once; with --together both videos of a pair are, in one question,
and OUT has sub-scores and overall scores (scores_a, overall_a, …) and no CoTs. Answers
are appended to OUT.cots as they come, and the same command goes on behind them. Pairs with a video that
cannot be read are left out and listed; OUT.cots then stays, so that the same command asks for these
alone. --api speaks OpenAI's chat completions, as most servers do.
"""

import argparse
import base64
import io
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import infer
from data import (
    DIMENSIONS,
    INSTRUCTION,
    TAGS,
    TEXT_LIMIT,
    DataError,
    Key,
    Pair,
    VideoSettings,
    check_instruction,
    check_reader,
    error_context,
    read_text,
    read_video,
)
from model import DeScore
from support import tables
from support.command import READER, Count, Positive, Whole, run_command
from support.formats import read_pairs
from tools import journal
from tools.forgiving import read_annotation
from tools.formats import check_out, write_pairs
from tools.together import PLACES, QUESTION, b_comes_first, check_question, read_both

try:
    import openai
    from PIL import Image
except ImportError:  # only --api needs them
    openai = None


def annotate(path: Path, out: Path, write: Callable[..., Iterator[dict]], made_by: dict,
             scores: bool = False, dimensions: dict[str, int] = DIMENSIONS,
             tags: tuple[str, str] = TAGS, together: bool = False) -> int:
    """Write the pairs of a file to `out`, with a CoT for every video or, `together`, with what one
    answer says of both.

    write(keys, done=…) yields a dict with video, prompt and cot, or error where the video cannot be
    read, for each key that is not in `done`; together, keys have two videos, and records videos and
    which is the first. made_by says what decides them. scores: make the sub-scores for `dimensions`
    the reference; pairs with an answer that has none, or a CoT longer than pair files may hold, are
    left out and counted. Returns an exit code, 1 if a video cannot be read. Raises DataError as
    `read_pairs`, `write` and `Journal` do, and where no pair is left."""
    check_out(out, path)
    pairs = read_pairs(path, dimensions=dimensions)
    print(pairs.summary())
    keys = []
    for pair in pairs:
        keys += questions(pair, together)
    keys = list(dict.fromkeys(keys))
    written = out.with_name(out.name + ".cots")
    done = journal.Journal(written, made_by, keys)
    judged = dict(done.records)
    new = write(keys, done=dict(judged))
    unit = "pair" if together else "video"
    for record in tqdm(new, "annotate", len(keys), initial=len(judged), unit=unit):
        record = {name: record[name] for name in RECORDED if name in record}
        judged[journal.key_of(record)] = record
        done.add(record)
    code = tables.list_unreadable(judged)
    kept, unreadable = [], 0
    for pair in pairs:
        records = [judged[key] for key in questions(pair, together)]
        if any("error" in record for record in records):
            unreadable += 1
            continue
        if together:
            of_use = take_scores(pair, records[0], dimensions, tags)
        else:
            of_use = take_cots(pair, records, scores, dimensions, tags)
        if of_use:
            kept.append(pair)
    useless = len(pairs) - unreadable - len(kept)
    if unreadable == len(pairs):
        first = next(record["error"] for record in judged.values() if "error" in record)
        raise DataError(f"{out}: no pair has two videos that can be read ({first})")
    if not kept:
        what = "answers" if together else "CoTs"
        raise DataError(f"{out}: no pair has {what} of use; {written} has them")
    write_pairs(out, kept)
    if not code:
        written.unlink()
    said = f"{out}: {len(kept)} pairs, {len(done.records)} {unit}s annotated"
    if useless:
        why = "an answer has no scores" if together else "a CoT has no scores or is too long"
        said += f"; {useless} left out, {why}"
    if unreadable:
        said += (f"; {unreadable} left out, a video cannot be read. The same command "
                 f"asks again for such videos alone, as long as {written} is there")
    print(said)
    return code


RECORDED = ("video", "videos", "prompt", "first", "cot", "error")  # of what `write` yields


def questions(pair: Pair, together: bool) -> list[tuple[str, ...]]:
    """The keys of what is asked about a pair: about each of its videos, or about both in one."""
    return [(pair.video_a, pair.video_b, pair.prompt)] if together else pair.videos()


def take_cots(pair: Pair, records: list[dict], scores: bool, dimensions: dict,
              tags: tuple[str, str]) -> bool:
    """Give a pair the CoTs about its videos, as they were written, and with `scores` their
    sub-scores. Returns whether they are of use."""
    pair.cot_a, pair.cot_b = (record["cot"] for record in records)
    pair.overall_a = pair.overall_b = None  # of an earlier annotation
    if max(len(pair.cot_a.encode()), len(pair.cot_b.encode())) > TEXT_LIMIT:
        return False
    if scores:
        annotations = [read_annotation(cot, dimensions, tags) for cot in (pair.cot_a, pair.cot_b)]
        if None in annotations:
            return False
        pair.scores_a, pair.scores_b = (each["dimensional_scores"] for each in annotations)
    return True


def take_scores(pair: Pair, record: dict, dimensions: dict, tags: tuple[str, str]) -> bool:
    """Give a pair what one answer about both its videos says: sub-scores and overall scores, and no
    CoTs, for the text is about two videos. Returns whether it can be read."""
    of_shown = read_both(record["cot"], dimensions, tags)
    if of_shown is None:
        return False
    a, b = of_shown if record["first"] == "A" else reversed(of_shown)
    pair.cot_a = pair.cot_b = None
    pair.scores_a, pair.scores_b = a["dimensional_scores"], b["dimensional_scores"]
    pair.overall_a, pair.overall_b = a["overall_score"], b["overall_score"]
    return True


@dataclass
class Api:
    """Asks an OpenAI-compatible chat endpoint for CoTs, showing it the sampled frames as images.

    The openai package asks again after a time-out or a refusal for load (HTTP 408, 409, 429, 5xx),
    in 0.5, 1, 2, … 8 seconds or when the server says; `ask` after an answer that is none. Any other
    refusal, and the last failure, stop with DataError."""

    url: str
    model: str
    settings: VideoSettings
    key: str | None = None
    max_new_tokens: int = 4096
    temperature: float = 1.0
    parallel: int = 8
    timeout: float = 120.0
    retries: int = 10
    instruction: str = INSTRUCTION
    reader: str = "av"  # of video files

    def __post_init__(self):
        check_reader(self.reader)
        if openai is None:
            raise DataError("--api needs openai: pip install -r tools/requirements.txt")
        if self.parallel < 1 or self.retries < 0:
            raise DataError("--parallel must be 1 or more, --retries 0 or more")
        # A key of None would be taken from OPENAI_API_KEY, whoever's endpoint this is.
        self.client = openai.OpenAI(base_url=self.url, api_key=self.key or "none",
                                    timeout=self.timeout, max_retries=self.retries)

    def __call__(self, keys: list[Key], done: dict) -> Iterator[dict]:
        """A record with the key and the cot for each key that is not done, in their order; with
        error for a cot where a video cannot be read."""
        with ThreadPoolExecutor(self.parallel) as pool:
            waiting = deque()
            try:
                for key in keys:
                    if key in done:
                        continue
                    waiting.append(pool.submit(self.ask, *key))
                    # Not far ahead: what waits behind a slow answer is lost in a kill.
                    if len(waiting) == 2 * self.parallel:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def ask(self, video: str, prompt: str) -> dict:
        """The record of one key. Raises DataError if no answer comes."""
        return {"video": video, "prompt": prompt} | self.answer({"<video>": video}, prompt)

    def answer(self, videos: dict[str, str], prompt: str) -> dict:
        """The answer, as cot, to the instruction with videos in their places; error if one of them
        cannot be read. Raises DataError if no answer comes."""
        try:
            message = {"role": "user", "content": self.content(videos, prompt)}
        except DataError as error:
            return {"error": str(error)}
        asked_about = " and ".join(videos.values())
        headers = {} if self.key else {"Authorization": openai.Omit()}
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(2**attempt / 4, 8))
            try:
                answer = self.client.chat.completions.create(
                    model=self.model, messages=[message], max_tokens=self.max_new_tokens,
                    temperature=self.temperature, extra_headers=headers)
                cot = answer.choices[0].message.content
            except openai.APIError as error:
                raise DataError(f"{self.url}: {failure(error, asked_about)}") from error
            except (ValueError, LookupError, TypeError, AttributeError):
                problem = "an answer that is no chat completion"
                continue
            if isinstance(cot, str) and cot.strip():
                # JSON can hold half of a surrogate pair, which no file of text can.
                return {"cot": cot.encode(errors="replace").decode()}
            problem = "an empty answer"
        raise DataError(f"{self.url}: gave up on {asked_about} after {attempt + 1} attempts: {problem}")

    def content(self, videos: dict[str, str], prompt: str) -> list[dict]:
        """The instruction, with each sampled frame behind its second in the places of the videos."""
        parts = []
        for text in re.split("(<video(?:_[12])?>)", self.instruction):
            if text in videos:
                for frame, second in zip(*read_video(videos[text], self.settings, self.reader)):
                    parts.append({"type": "text", "text": f"<{second:.1f} seconds>"})
                    parts.append({"type": "image_url", "image_url": {"url": data_url(frame)}})
            elif text:
                parts.append({"type": "text", "text": text.replace("<prompt>", prompt)})
        return parts


@dataclass
class PairApi(Api):
    """Asks about both videos of a pair in one question. Which is shown first is drawn for each pair."""

    seed: int = 0

    def ask(self, video_a: str, video_b: str, prompt: str) -> dict:
        """The record of one pair, which says which of its videos was the first, "A" or "B"."""
        shown, first = [video_a, video_b], "A"
        if b_comes_first(self.seed, video_a, video_b, prompt):
            shown, first = [video_b, video_a], "B"
        record = {"videos": [video_a, video_b], "prompt": prompt, "first": first}
        return record | self.answer(dict(zip(PLACES, shown)), prompt)


def data_url(frame: torch.Tensor) -> str:
    """A frame (3, H, W) uint8 as a PNG, which loses nothing, in a URL."""
    file = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def failure(error: "openai.APIError", asked_about: str) -> str:
    """Why openai has given up on a question about a video or two, on one line."""
    if isinstance(error, openai.APIStatusError):
        said = " ".join(error.response.text.split())[:300]
        reason = f"HTTP {error.status_code} {error.response.reason_phrase}: {said}"
    else:  # no connection, cut off, timed out
        reason = f"{error} ({error.__cause__})"
    # The header in which openai says how often it has asked again: not at all after, say, HTTP 401.
    attempts = int(error.request.headers.get("x-stainless-retry-count", 0)) + 1
    return f"gave up on {asked_about} after {attempts} attempt{'s' * (attempts > 1)}: {reason}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("pairs", type=Path, help="a pair file of any known kind")
    add("out", type=Path, help="a file in our own format, JSON lines")
    add("--model", help="a Qwen3-VL or a saved DeScore, directory or hub id")
    add("--api", metavar="URL", help="an OpenAI-compatible endpoint instead, up to /v1")
    add("--api-model", help="the model's name there")
    add("--api-key-env", default="OPENAI_API_KEY", help="variable that holds the key, if any")
    add("--parallel", type=Count, default=Api.parallel, help="requests under way at a time")
    add("--timeout", type=Positive, default=Api.timeout, help="seconds a request may take")
    add("--retries", type=Whole, default=Api.retries, help="attempts after the first")
    add("--scores", action="store_true", help="keep the sub-scores as reference, for stage 2")
    add("--together", action="store_true", help="with --api and --scores: one question about both "
        "videos of a pair, shown in an order that is drawn")
    add("--instruction", type=Path, help="a file with <video> and <prompt> in it, such as "
        "presets/detailed.txt [the model's own]; --together: with <video_1>, <video_2> and <prompt> "
        "[presets/together.txt]")
    infer.add_thinking(
        parser, samples=None, repetition_penalty=None, seed={"help": None},
        temperature={"default": Api.temperature, "help": None},
        think_tokens={"also": ["--max-tokens"], "help": "tokens at a time, of prompts and CoTs"})
    add("--fps", type=Positive, help="frames sampled a second [the model's own; --api: 2]")
    add("--min-pixels", type=Count, help="a frame, at least [the model's own; --api: 131,072]")
    add("--max-pixels", type=Count, help="a frame, at most [the model's own; --api: 307,200]")
    add("--reader", **READER)
    args = parser.parse_args()
    if bool(args.model) == bool(args.api) or bool(args.api) != bool(args.api_model):
        raise DataError("annotate needs --model, or --api and --api-model")
    if args.together and args.model:
        raise DataError("--together is for --api alone: a model of ours thinks about one video")
    if args.together and not args.scores:
        raise DataError("--together needs --scores: it gives reference sub-scores, and no CoTs")
    instruction = read_text(args.instruction) if args.instruction else None
    given = {name: getattr(args, name) for name in ("fps", "min_pixels", "max_pixels")}
    video = {name: value for name, value in given.items() if value is not None}
    if args.api:
        with error_context("the frames cannot be so", TypeError):
            settings = VideoSettings(**{"max_pixels": 307_200} | video)
        how = (args.api, args.api_model, settings, os.environ.get(args.api_key_env), args.max_new_tokens,
               args.temperature, args.parallel, args.timeout, args.retries)
        if args.together:
            instruction = read_text(QUESTION) if instruction is None else instruction
            check_question(instruction)
            write = PairApi(*how, instruction, args.reader, args.seed)
        else:
            instruction = INSTRUCTION if instruction is None else instruction
            check_instruction(instruction)
            write = Api(*how, instruction, args.reader)
        dimensions, tags = DIMENSIONS, TAGS
        made_by = journal.deciding(vars(args)) | {"instruction": instruction, "video": asdict(settings)}
    else:
        model = DeScore.load(args.model, video=video, reader=args.reader)
        if instruction is not None:
            model.processor.set_instruction(instruction)
        write = partial(infer.judge, model, thinking=infer.read_thinking(args), finite=False)
        dimensions, tags = model.processor.dimensions, model.processor.tags
        made_by = journal.made_by(model, args, scores=False)
    sys.exit(annotate(args.pairs, args.out, write, made_by, args.scores, dimensions, tags, args.together))


if __name__ == "__main__":
    run_command(main)
