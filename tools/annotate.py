"""Let a model write a CoT for every video of a pair file: one here, or one behind an endpoint.

    python -m tools.annotate PAIRS OUT --model Qwen/Qwen3-VL-8B-Instruct
    torchrun --nproc_per_node 8 -m tools.annotate PAIRS OUT --model Qwen/Qwen3-VL-8B-Instruct
    python -m tools.annotate PAIRS OUT --scores --api https://HOST/v1 --api-model NAME
    python -m tools.annotate PAIRS OUT --scores --together --api https://HOST/v1 --api-model NAME

Each (video, prompt) is asked about once; with --together both videos of a pair are, in one question,
and OUT has sub-scores and overall scores (scores_a, overall_a, …) and no CoTs. Answers
are appended to OUT.cots as they come, and the same command goes on behind them. Pairs are left out, and
said, of which a video is missing, cannot be read, is refused by the endpoint, or is answered by nothing of
use. OUT.cots then stays, so that the same command asks for these alone. --api speaks OpenAI's chat
completions, as most servers do (tools/endpoint.py).
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

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
from support.command import READER, Count, Positive, Share, Whole, run_command
from support.formats import read_pairs
from support.ranks import ALONE, Ranks
from tools import journal
from tools.asking import Bound, ask_all
from tools.completion import Refused, has_thought
from tools.endpoint import Endpoint, Failed, key_in, one_line, shown
from tools.forgiving import read_annotation
from tools.formats import check_out, write_pairs
from tools.shown import Image, clip, pictures, why_no_clips
from tools.together import PLACES, QUESTION, b_comes_first, check_question, read_both


def annotate(path: Path, out: Path, write: Callable[..., Iterator[dict]], made_by: dict,
             scores: bool = False, dimensions: dict[str, int] = DIMENSIONS,
             tags: tuple[str, str] = TAGS, together: bool = False, strict: bool = False,
             ranks: Ranks = ALONE) -> int:
    """Write the pairs of a file to `out`, with a CoT for every video or, `together`, with what one
    answer says of both.

    write(keys, done=…) yields a dict with video, prompt and cot, or error where there is none, for
    each key that is not in `done`; together, keys have two videos, and records videos and which is
    the first. made_by says what decides them. scores: make the sub-scores for `dimensions` the
    reference. strict: CoTs without scores or a thought are of no use either, and the next start asks
    again for what is of none. Pairs with such answers are left out and counted. Of `ranks`, which
    `write` shares the work with, the first alone writes files. Returns an exit code, 1 if any pair is
    left out. Raises DataError as `read_pairs`, `write` and `Journal` do, and where no pair is left."""
    check_out(out, path)
    pairs = read_pairs(path, dimensions=dimensions)
    keys = []
    for pair in pairs:
        keys += questions(pair, together)
    keys = list(dict.fromkeys(keys))
    ranks.agree({}, path, keys)
    if not ranks.first:
        for _ in write(keys, done=ranks.gather([])):
            pass
        return 0
    print(pairs.summary())
    written = out.with_name(out.name + ".cots")
    done = journal.Journal(written, made_by, keys, free=("max_new_tokens",) if strict else ())

    def fault(record: dict) -> str | None:
        return what_is_wrong(record, scores, dimensions, tags, together, strict)

    judged = dict(done.records)
    settled = {key: record for key, record in judged.items() if not (strict and fault(record))}
    if len(settled) < len(judged):
        print(f"{written}: asking again for {len(judged) - len(settled)} answers of no use", file=sys.stderr)
    ranks.gather(list(settled))  # what the others need not do
    unit = "pair" if together else "video"
    of_use = bool(settled)
    try:
        with closing(write(keys, done=dict(settled))) as records:
            for record in tqdm(records, "annotate", len(keys), initial=len(settled), unit=unit):
                record = {name: record[name] for name in RECORDED if name in record}
                judged[journal.key_of(record)] = record
                done.add(record)
                of_use = of_use or not ("error" in record or fault(record))
                if strict and not of_use and len(done.records) >= FIRST:
                    raise DataError(nothing_left(out, written, judged, Counter([USELESS]), fault))
    except (DataError, KeyboardInterrupt):
        print(f"{written} has {len(done.records)} of {len(keys)} {unit}s; the same command goes on behind "
              "them", file=sys.stderr)
        raise
    finally:
        tables.list_unreadable(judged)
    kept = []
    left_out: Counter = Counter(MISSING for row in pairs.left_out if row["reason"] == "missing")
    for pair in pairs:
        records = [judged[key] for key in questions(pair, together)]
        why = why_not(records, fault)
        if why:
            left_out[why] += 1
            continue
        if together:
            take_scores(pair, records[0], dimensions, tags)
        else:
            take_cots(pair, records, scores, dimensions, tags)
        kept.append(pair)
    if not kept:
        raise DataError(nothing_left(out, written, judged, left_out, fault))
    write_pairs(out, kept)
    said = [f"{out}: {len(kept)} pairs, {len(done.records)} {unit}s annotated"]
    said += [f"{count} left out, {why}" for why, count in left_out.items()]
    print("; ".join(said))
    if USELESS in left_out:
        print(f"answers of no use: {faults_of(judged, fault)}")
    bare = sum(not has_thought(record["cot"], tags) for record in judged.values() if "cot" in record)
    if strict and bare and not together:
        print(f"answers without a thought, which stage 1 needs: {bare}")
    if not strict:  # what a model here writes is taken as it is
        odd = partial(what_is_wrong, scores=False, dimensions=dimensions, tags=tags, together=together,
                      strict=True)
        if faults_of(judged, odd):
            print(f"among the CoTs: {faults_of(judged, odd)}")
    if not left_out:
        written.unlink()
    elif strict or set(left_out) != {USELESS}:
        print(f"the same command asks again for what was left out, and for that alone, with {written}")
        return 1
    return 0


MISSING = "a video is missing"
UNREADABLE = "a video cannot be read"
REFUSED = "the endpoint has no answer"
USELESS = "an answer is of no use"
FIRST = 50  # answers, of which one has to be of use

# Of what `write` yields.
RECORDED = ("video", "videos", "prompt", "first", "cot", "truncated", "refused", "error")


def questions(pair: Pair, together: bool) -> list[tuple[str, ...]]:
    """The keys of what is asked about a pair: about each of its videos, or about both in one."""
    return [(pair.video_a, pair.video_b, pair.prompt)] if together else pair.videos()


def what_is_wrong(record: dict, scores: bool, dimensions: dict, tags: tuple[str, str],
                  together: bool, strict: bool) -> str | None:
    """Why an answer is of no use to `annotate`, in a few words; None if it is of use."""
    cot = record.get("cot", "")
    if strict and record.get("truncated"):
        return "cut off"
    if len(cot.encode()) > TEXT_LIMIT:
        return "too long"
    read = read_both if together else read_annotation
    if (scores or strict) and read(cot, dimensions, tags) is None:
        return "without scores that can be read"
    if strict and not scores and not has_thought(cot, tags):
        return "without a thought"
    return None


def why_not(records: list[dict], fault: Callable[[dict], str | None]) -> str | None:
    """Why a pair with these answers is left out, if it is."""
    if any("error" in record for record in records):
        return REFUSED if any("refused" in record for record in records) else UNREADABLE
    return USELESS if any(map(fault, records)) else None


def faults_of(judged: dict, fault: Callable[[dict], str | None]) -> str:
    """How many answers are of no use, by what is wrong with them."""
    faults = Counter(fault(record) for record in judged.values() if "cot" in record)
    return ", ".join(f"{count} {why}" for why, count in faults.most_common() if why)


def nothing_left(out: Path, written: Path, judged: dict, left_out: Counter,
                 fault: Callable[[dict], str | None]) -> str:
    """Why no pair can be written, with an example."""
    if USELESS in left_out:
        example = next(record for record in judged.values() if "cot" in record and fault(record))
        what = "answers" if "videos" in example else "CoTs"
        return (f"{out}: no pair has {what} of use: {faults_of(judged, fault)}; {written} has them, such "
                f"as {one_line(example['cot'])!r}")
    first = next(record["error"] for record in judged.values() if "error" in record)
    what = "can be read" if UNREADABLE in left_out else "the endpoint answers about"
    return f"{out}: no pair has two videos that {what} ({first})"


def take_cots(pair: Pair, records: list[dict], scores: bool, dimensions: dict,
              tags: tuple[str, str]) -> None:
    """Give a pair the CoTs about its videos, as they were written, and with `scores` their
    sub-scores."""
    pair.cot_a, pair.cot_b = (record["cot"] for record in records)
    pair.overall_a = pair.overall_b = None  # of an earlier annotation
    if scores:
        annotations = [read_annotation(cot, dimensions, tags) for cot in (pair.cot_a, pair.cot_b)]
        pair.scores_a, pair.scores_b = (each["dimensional_scores"] for each in annotations)


def take_scores(pair: Pair, record: dict, dimensions: dict, tags: tuple[str, str]) -> None:
    """Give a pair what one answer about both its videos says: sub-scores and overall scores, and no
    CoTs, for the text is about two videos."""
    of_shown = read_both(record["cot"], dimensions, tags)
    a, b = of_shown if record["first"] == "A" else reversed(of_shown)
    pair.cot_a = pair.cot_b = None
    pair.scores_a, pair.scores_b = a["dimensional_scores"], b["dimensional_scores"]
    pair.overall_a, pair.overall_b = a["overall_score"], b["overall_score"]


@dataclass
class Api:
    """Asks an OpenAI-compatible chat endpoint for CoTs (tools/endpoint.py), showing it the sampled
    frames as pictures or, with `clips`, where it takes them, as a clip (tools/shown.py).

    A video that is refused, or for which all attempts fail, gets an error, as one that cannot be read
    does. When these are more than max_skipped of all, and more than a `FEW`, or as many attempts fail
    in a row of videos, DataError says so; as it does where the endpoint refuses all, or has no room
    for an hour."""

    url: str = field(repr=False)  # it may hold a password
    model: str
    settings: VideoSettings
    key: str | None = field(default=None, repr=False)
    max_new_tokens: int = 4096
    temperature: float = 1.0
    parallel: int = 8
    timeout: float = 120.0
    retries: int = 10
    instruction: str = INSTRUCTION
    reader: str = "av"  # of video files
    max_skipped: float = field(default=0.01, kw_only=True)
    clips: bool = field(default=False, kw_only=True)

    def __post_init__(self):
        check_reader(self.reader)
        if Image is None:
            raise DataError("an endpoint needs pillow: pip install -r tools/requirements.txt")
        if self.parallel < 1 or self.retries < 0:
            raise DataError("--parallel must be 1 or more, --retries 0 or more")
        self.endpoint = Endpoint(self.url, self.model, self.key, self.max_new_tokens, self.temperature,
                                 self.timeout, self.retries)
        why_not = why_no_clips(self.endpoint) if self.clips else None
        if why_not:
            print(f"{self.endpoint.shown}: gets pictures, not clips: {why_not}", file=sys.stderr)
            self.clips = False

    def __call__(self, keys: list[Key], done: dict) -> Iterator[dict]:
        """A record with the key and the cot for each key that is not done, as they are answered; with
        error for a cot where there is none. Raises as `ask_all` does."""
        keys = [key for key in keys if key not in done]
        bound = Bound(self.endpoint.shown, len(keys) + len(done), self.max_skipped)
        return ask_all(self.ask, keys, self.parallel, self.endpoint.stop, bound, self.timeout)

    def ask(self, video: str, prompt: str) -> dict:
        """The record of one key."""
        return {"video": video, "prompt": prompt} | self.answer({"<video>": video}, prompt)

    def answer(self, videos: dict[str, str], prompt: str) -> dict:
        """The answer, as cot, to the instruction with videos in their places; error if one of them
        cannot be read, or the endpoint has none, which is then `refused`."""
        try:
            question = self.question(videos, prompt)
        except DataError as error:
            return {"error": str(error)}
        return self.answer_to(question, " and ".join(videos.values()))

    def answer_to(self, question: tuple[list[dict], dict], name: str) -> dict:
        """The answer to a question about videos of this name."""
        try:
            return self.endpoint.ask(*question)
        except Refused as error:
            reason = DataError(f"{name}: {self.endpoint.shown}: {self.endpoint.clean(str(error))}")
            return {"error": str(reason), "refused": True, "failed": isinstance(error, Failed)}

    def texts(self, prompt: str) -> list[str]:
        """What a message says, cut at the places of videos, which stand at the odd ones."""
        texts = re.split("(<video(?:_[12])?>)", self.instruction)
        return [text if place % 2 else text.replace("<prompt>", prompt) for place, text in enumerate(texts)]

    def question(self, videos: dict[str, str], prompt: str) -> tuple[list[dict], dict]:
        """The parts of a message, the instruction with what shows the videos in their places, and what
        goes beside it."""
        parts = []
        beside = {}
        for place, text in enumerate(self.texts(prompt)):
            if place % 2 and text in videos:
                frames, seconds = read_video(videos[text], self.settings, self.reader)
                if self.clips:
                    shown, beside = clip(frames, seconds, self.settings.temporal_patch_size)
                else:
                    shown = pictures(frames, seconds)
                parts += shown
            elif text:
                parts.append({"type": "text", "text": text})
        return parts, beside


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("pairs", type=Path, help="a pair file of any known kind")
    add("out", type=Path, help="a file in our own format, JSON lines")
    add("--model", help="a Qwen3-VL or a saved DeScore, directory or hub id")
    add("--api", metavar="URL", help="an OpenAI-compatible endpoint instead, up to /v1")
    add("--api-model", help="the model's name there")
    add("--api-key-env", default="OPENAI_API_KEY", help="variable that holds the key [the usual one, if set]")
    add("--api-clips", action="store_true", help="with --api: show a Qwen3-VL behind vLLM clips, with the "
        "times of their frames, not pictures (docs/scale.md)")
    add("--parallel", type=Count, default=Api.parallel, help="requests under way at a time")
    add("--timeout", type=Positive, default=Api.timeout, help="seconds a request may take")
    add("--retries", type=Whole, default=Api.retries, help="attempts after the first")
    add("--max-skipped", type=Share, default=Api.max_skipped,
        help="share of the questions that may stay without an answer; five always may")
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
    if args.api_clips and (args.together or args.model):
        raise DataError("--api-clips is for --api, and not for --together: a question has one clip")
    instruction = read_text(args.instruction) if args.instruction else None
    given = {name: getattr(args, name) for name in ("fps", "min_pixels", "max_pixels")}
    video = {name: value for name, value in given.items() if value is not None}
    ranks = ALONE  # those who ask an endpoint need no ranks
    if args.api:
        with error_context("the frames cannot be so", TypeError):
            settings = VideoSettings(**{"max_pixels": 307_200} | video)
        key = key_in(args.api_key_env)
        how = (args.api, args.api_model, settings, key, args.max_new_tokens,
               args.temperature, args.parallel, args.timeout, args.retries)
        bound = {"max_skipped": args.max_skipped}
        if args.together:
            instruction = read_text(QUESTION) if instruction is None else instruction
            check_question(instruction)
            write = PairApi(*how, instruction, args.reader, args.seed, **bound)
        else:
            instruction = INSTRUCTION if instruction is None else instruction
            check_instruction(instruction)
            write = Api(*how, instruction, args.reader, **bound, clips=args.api_clips)
        args.api_clips = write.clips
        dimensions, tags = DIMENSIONS, TAGS
        made_by = journal.deciding(vars(args)) | {
            "api": shown(args.api), "instruction": instruction, "video": asdict(settings)}
    else:
        ranks = Ranks.start()
        model = DeScore.load(args.model, video=video, reader=args.reader)
        if instruction is not None:
            model.processor.set_instruction(instruction)
        ranks.agree(vars(args), args.pairs, [], model)
        write = partial(infer.judge, model, thinking=infer.read_thinking(args), finite=False, ranks=ranks)
        dimensions, tags = model.processor.dimensions, model.processor.tags
        made_by = journal.made_by(model, args, scores=False)
    code = annotate(args.pairs, args.out, write, made_by, args.scores, dimensions, tags, args.together,
                    strict=bool(args.api), ranks=ranks)
    ranks.stop()
    sys.exit(code)


if __name__ == "__main__":
    run_command(main)
