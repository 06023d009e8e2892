"""Videos that are held in memory, in the shape in which `data.open_video` takes a file's: the number
of frames, the second of each, and the frames themselves."""

import hashlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from threading import Lock

import numpy as np
import torch

from data import DataError, Key, make_instruction, parse_cot
from infer import Thinking, by_key, judge, one_record
from model import DeScore
from support import tables
from support.files import default_model
from tools import client


class Clip:
    """A video in memory with so many frames, `fps` of them a second. Two with the same content and
    rate are equal. What holds the frames is a subclass with `picture`."""

    def __init__(self, total: int, fps: float, content: Iterable[bytes]):
        self.total, self.fps = total, fps
        digest = hashlib.sha256(repr((type(self).__name__, total, fps)).encode())
        for part in content:
            digest.update(part)
        self.digest = digest.hexdigest()

    @property
    def seconds(self) -> list[float]:
        """When each frame is shown. Raises ValueError if there is none."""
        if not self.total:
            raise ValueError("it has no frames")
        return [index / self.fps for index in range(self.total)]

    def picture(self, index: int) -> np.ndarray:
        """A frame (H, W, 3) uint8."""
        raise NotImplementedError

    def frames(self, indices: list[int]) -> Iterator[np.ndarray]:
        """The frames (H, W, 3) uint8 at these indices. Raises ValueError if they are no video."""
        size = None
        for index in indices:
            picture = self.picture(index)
            size = size or picture.shape
            if picture.shape != size:
                raise ValueError(f"frames of {size} and of {picture.shape}")
            yield picture

    def __eq__(self, other) -> bool:
        return isinstance(other, Clip) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        return f"a clip of {self.total} frames"


class Frames(Clip):
    """A clip of arrays, as `client.split` finds them."""

    def __init__(self, arrays, fps: float):
        self.arrays, self.problem = arrays, client.problem(arrays)
        super().__init__(len(arrays), fps, map(content, arrays))

    def picture(self, index: int) -> np.ndarray:
        if self.problem:
            raise ValueError(self.problem)
        return client.grey_levels(self.arrays[index])


def content(array: np.ndarray) -> bytes:
    """What tells an array from others: its type, shape and values."""
    return f"{array.dtype}{array.shape}".encode() + array.tobytes()


def clip_keys(videos, prompts, fps=None, layout: str | None = None) -> list[Key]:
    """(video, prompt) keys of what a caller holds: a video is the path of a file or a Clip.

    videos, layout: see `client.split`; prompts, fps: one for all, or a list. DataError where they
    make no sense; what a single video shows is looked at when it is read."""
    try:
        videos = client.split(videos, layout)
        prompts, rates = client.paired(videos, prompts, fps)
    except (ValueError, TypeError) as error:
        raise DataError(str(error)) from error
    keys = []
    for video, prompt, rate in zip(videos, prompts, rates):
        if isinstance(video, os.PathLike):
            video = os.fspath(video)
        elif not isinstance(video, str) and not client.is_opened(video):
            video = Frames(video, rate)
        keys.append((video, prompt))
    return keys


def digest_of(key: Key) -> str:
    """What tells a video and its prompt from others: by their content, where it is at hand."""
    video, prompt = key
    name = video.digest if isinstance(video, Clip) else str(video)
    return hashlib.sha256(json.dumps([name, prompt]).encode()).hexdigest()


def number_of(key: Key) -> int:
    """A number that a video and its prompt have in any company: it decides what is drawn for them."""
    return int(digest_of(key)[:16], 16)


class Together:
    """Calls of many threads, made together: `work` gets the items of all who ask with the same
    options while an earlier call is at work, or within a window of seconds, and returns as many
    answers in their order. One call is at work at a time."""

    def __init__(self, work: Callable[[list, dict], list], window: float):
        self.work, self.window = work, window
        self.lock, self.waiting = Lock(), deque()

    def __call__(self, items: list, options: dict) -> list:
        """The answers for these items. Raises what `work` raises."""
        if not items:
            return []
        answer = Future()
        self.waiting.append((items, options, answer))
        # Whoever gets the lock works for all who wait; the others find their answers there.
        with self.lock:
            if not answer.done():
                time.sleep(self.window)
                self.answer_all()
        return answer.result()

    def answer_all(self) -> None:
        taken, groups = [self.waiting.popleft() for _ in range(len(self.waiting))], {}
        for request in taken:
            groups.setdefault(repr(request[1]), []).append(request)
        try:
            for alike in groups.values():
                self.answer(alike, alike[0][1])
        finally:  # whoever is interrupted leaves the others' to them
            self.waiting.extend(request for request in taken if not request[2].done())

    def answer(self, alike: list, options: dict) -> None:
        items = list(chain.from_iterable(request[0] for request in alike))
        failure = None
        try:
            found = iter(self.work(items, options))
        except Exception as error:  # noqa: BLE001 (it is the caller's, whatever it is)
            failure = error
        if failure and len(alike) > 1:
            del failure  # and what it holds in memory
            for request in alike:
                self.answer([request], options)
            return
        for some, _, answer in alike:
            if failure:
                answer.set_exception(failure)
            else:
                answer.set_result(list(islice(found, len(some))))


def rewarded(model, record: dict, standardise: bool = True) -> dict:
    """A judged video as `reward` gives it: score, standardised, cot, sub_scores, truncated,
    format_ok, error, and what else is known. Where there is no score, NaN stands for it and the
    error says why."""
    found = client.unusable(record.get("error"))
    if "cot" in record or found["error"] is None:  # a model has seen it
        known = tables.describe(model, {"score": math.nan} | record)
        found |= {name: value for name, value in known.items() if name not in ("video", "prompt")}
    if found["error"] is None and not math.isfinite(found["score"]):
        found["error"] = (f"its score is {found['score']}: {model.name} has broken weights, or its "
                          "numbers ran over")
    found["standardised"] = None
    if standardise and found["error"] is None:
        found["standardised"] = tables.standardised(model, found["score"])
    return found


def unfit(model: DeScore, limit: int, cot: str, truncated: bool) -> str | None:
    """Why the score behind a CoT is no judgement, or None: it never ended, or its answer cannot be
    read. What a model with an instruction of its own answers is that instruction's affair."""
    if truncated:
        return f"its CoT did not end within {limit:,} tokens"
    processor = model.processor
    usual = make_instruction(processor.dimensions, processor.tags)
    is_asked = processor.instruction == usual
    if is_asked and parse_cot(cot, processor.dimensions, processor.tags) is None:
        return "its CoT has no answer that can be read"
    return None


# R_l pays for nothing beyond 2,000 tokens (`rl.length_reward`), and no CoT needs more.
LONGEST_ANSWER = 2048


def longest_answer(model: DeScore) -> int:
    """How many tokens a CoT needs at most: as many as the policy could write when it was trained,
    and no more than `LONGEST_ANSWER`."""
    trained = model.info.get("args", {}).get("max_new_tokens", LONGEST_ANSWER)
    return min(trained, LONGEST_ANSWER)


class Float32:
    """Within it the default dtype is float32, for as long as any thread is within it: it is one for
    all threads. The last to leave puts back what the first has found."""

    def __init__(self):
        self.lock, self.inside, self.found = Lock(), 0, torch.float32

    def __enter__(self):
        with self.lock:
            if not self.inside:
                self.found = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self.inside += 1

    def __exit__(self, *_):
        with self.lock:
            self.inside -= 1
            if not self.inside and self.found != torch.float32:
                torch.set_default_dtype(self.found)


FLOAT32 = Float32()
LOADING = Lock()  # torch's random numbers and Python's filters of warnings are one for all threads too


@contextmanager
def as_if_alone():
    """Within it torch is as a new process finds it, whatever a trainer has set: default dtype and
    device, autocast, inference mode. Afterwards they are as they were."""
    with ExitStack() as stack:
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(FLOAT32)
        yield


def reward(
        model: DeScore, videos, prompts: str | list[str], *, thinking: Thinking | None = None,
        fps=None, layout: str | None = None, think=True, standardise=True, accept_any=False,
        **fields) -> list[dict]:
    """Think about videos that are at hand, and score how well each follows its prompt.

    videos: a path; frames, uint8 or float in [0, 1], (T, 3, H, W) of one video, (B, T, 3, H, W) or
    (B, 3, T, H, W) of several; a list of PIL images; or a list of these. fps: frames a second,
    which files alone say themselves. prompts, fps: one for all videos, or a list. layout: "TCHW",
    "CTHW" or "THWC", where sizes do not tell the colour's axis. thinking: a record, or in its
    place its fields by name, where the temperature is by default 0, with more samples 1, and
    max_new_tokens `longest_answer`; a video's draws depend on it, its prompt and the seed alone.

    Returns a dict a video: score (a mean over the samples that count), standardised (standard
    deviations from the mean of held-out videos; None if the model knows none), cot, sub_scores,
    truncated, format_ok, error. A video that cannot be scored has the score NaN, and an error that
    says why; so has one whose CoTs are no judgement (`unfit`), unless accept_any. `usable` is the
    number of its CoTs that count. What is the same twice is thought about once. DataError where the
    call makes no sense."""
    model.check_head()
    asked = clip_keys(videos, prompts, fps, layout)
    keys = list(dict.fromkeys(asked))
    if thinking is None:
        if fields.get("temperature") is None:
            fields["temperature"] = float(fields.get("samples", 1) > 1)
        fields.setdefault("max_new_tokens", longest_answer(model))
    thinking = one_record(thinking, fields)
    fits = thinking.samples >= 1 and thinking.max_new_tokens >= 1
    if not (fits and thinking.temperature >= 0 and thinking.seed >= 0):
        raise DataError("samples or max_new_tokens below 1, or temperature or seed below 0")
    refuse = None if accept_any else partial(unfit, model, thinking.max_new_tokens)
    with as_if_alone():
        judged = by_key(judge(model, keys, thinking, think=think, finite=False, unfit=refuse,
                              numbers=[number_of(key) for key in keys]))
    return [rewarded(model, judged[key], standardise) for key in asked]


class Scorer:
    """A model that any number of threads may ask. While the videos of one are thought about those
    of others gather, and go through the model together next."""

    def __init__(self, model_dir: str | Path | None = None, device=None, *, window=0.01, reader="av"):
        """model_dir: a saved model or a run's folder; None for what infer.py would take. window: seconds
        to wait for others who ask at the same time; reader: of video files (`data.read_video`)."""
        model_dir = model_dir or default_model(or_toy=True)
        # Query and head are drawn before they are loaded; a trainer's noise is not to change by it.
        with LOADING, as_if_alone(), torch.random.fork_rng(devices=[]):
            self.model = DeScore.load(model_dir, device=device, reader=reader)
        self.model.check_head()
        self.together = Together(self.score, window)

    def __call__(self, videos, prompts, *, fps=None, layout=None, **how) -> list[dict]:
        """`reward`, with the same options."""
        return self.together(clip_keys(videos, prompts, fps, layout), how)

    def score(self, keys: list[Key], how: dict) -> list[dict]:
        return reward(self.model, *map(list, zip(*keys)), **how)
