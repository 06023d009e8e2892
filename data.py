"""From files to tensors: videos, prompts, chains of thought, preference pairs.

Everything a Qwen3-VL reads is made here, token for token and pixel for pixel as its own
pipeline makes it (qwen-vl-utils 0.0.14, the processor of transformers 4.57).
"""

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import chain, groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from support.frames import ERRORS, READERS, Video, import_decord

# What a CoT judges, and how much each weighs in an overall score; above 1 is primary.
# Instruction, format, rewards, tables follow from here; a saved model carries its own.
DIMENSIONS = {"subject": 2, "dynamics": 2, "camera": 1, "environment": 1, "style": 1}

# The tags around what a CoT reasons and around its answer. A saved model carries these too.
TAGS = ("think", "answer")

TASK = """<video>The video above was generated from this prompt:
<prompt>

How well does it follow the prompt? Judge these dimensions: <dimensions>. \
Reason inside <think-tags> first: what the prompt asks for, what the video shows, \
a judgement for each dimension. \
Then write inside <answer-tags> one JSON object of this form:
{"dimensional_scores": <example>, "overall_score": 3.4}
A dimension gets 2 if it is fully met, 1 if partly, 0 if missed, \
"N/A" if the prompt does not ask for it; overall_score lies between 1 and 5."""


def make_instruction(dimensions=DIMENSIONS, tags=TAGS) -> str:
    """What the model is asked; <video> and <prompt> stand for the two things to be judged."""
    lists = []
    for heavy, kind in ((True, "primary"), (False, "secondary")):
        *names, last = [name for name in dimensions if (dimensions[name] > 1) == heavy] or [""]
        if last:
            lists.append(f"{', '.join(names)} and {last} ({kind})" if names else f"{last} ({kind})")
    example = dict(zip(dimensions, (2, 1, "N/A", 2, 0) * len(dimensions)))
    text = TASK.replace("<dimensions>", ", ".join(lists))
    think, answer = tags
    text = text.replace("<think-tags>", f"<{think}> </{think}>")
    text = text.replace("<answer-tags>", f"<{answer}> </{answer}>")
    return text.replace("<example>", json.dumps(example))


INSTRUCTION = make_instruction()


def check_instruction(instruction: str) -> None:
    """DataError unless a text has a place for the video and for its prompt."""
    checked(instruction, "the instruction")
    if instruction.count("<video>") != 1 or "<prompt>" not in instruction:
        raise DataError("the instruction must hold <video> exactly once, and <prompt> "
                        "where the prompt belongs")


Key = tuple[str, str]  # a video's file and its prompt
Grid = tuple[int, int, int]  # how many patches: in time, down, across


class DataError(ValueError):
    """Bad input; the message names the file (and row) and what is wrong, on one line."""

    def __str__(self) -> str:
        return re.sub(r"[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]", " ", super().__str__())


@contextmanager
def error_context(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """Within it, exceptions of these kinds become a DataError that begins with the message."""
    try:
        yield
    except DataError:
        raise
    except kinds as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DataError(f"{message} ({reason})") from error


TEXT_LIMIT = 50_000  # bytes of a prompt or CoT: 6,200 tokens of 8, more than text has


def checked(text: str, name: str) -> str:
    """The text. DataError if it is too long or holds half of a surrogate pair."""
    with error_context(f"{name} is no Unicode text", UnicodeEncodeError):
        size = len(text.encode())
    if size > TEXT_LIMIT:
        raise DataError(f"{name} has {size:,} bytes, more than {TEXT_LIMIT:,}")
    return text


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ------------------------------
# Videos


@dataclass(frozen=True)
class VideoSettings:
    """How a video becomes patches. The defaults are qwen-vl-utils' and Qwen3-VL's."""

    fps: float = 2.0  # frames sampled a second
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 128 * 32 * 32  # a frame
    max_pixels: int = 768 * 32 * 32  # a frame
    total_pixels: int = int(128000 * 32 * 32 * 0.9)  # a video; bounds a long one's frames
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            fits = is_number(value) and isinstance(value, (int, field.type))
            if not fits or not value > 0:
                raise TypeError(f"{field.name} is {value!r}")
        if self.max_frames < 2:
            raise TypeError("max_frames is 1")


def smart_nframes(total: int, video_fps: float, settings: VideoSettings) -> int:
    """How many of `total` frames to sample: an even number (qwen-vl-utils 0.0.14, `smart_nframes`).
    A single frame, which it refuses, is shown twice, as Qwen3-VL shows an image."""
    if total < 2:
        return 2
    lowest = math.ceil(settings.min_frames / 2) * 2
    highest = math.floor(min(settings.max_frames, total) / 2) * 2
    wanted = total / video_fps * settings.fps
    return math.floor(min(max(wanted, lowest), highest, total) / 2) * 2


def smart_resize(height: int, width: int, frames: int, settings: VideoSettings) -> tuple[int, int]:
    """The size at which the model sees a frame: sides that are multiples of patch_size · merge_size,
    pixels within bounds, the shape nearly kept (qwen-vl-utils 0.0.14, `smart_resize`)."""
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"{width} x {height} pixels: one side is over 200 times the other")
    factor, lowest = settings.patch_size * settings.merge_size, settings.min_pixels
    share = settings.total_pixels / frames * 2  # qwen-vl-utils counts two frames as one
    highest = min(settings.max_pixels, max(share, int(lowest * 1.05)))
    h, w = (max(factor, round(side / factor) * factor) for side in (height, width))
    if h * w > highest:
        scale = math.sqrt(height * width / highest) * factor
        h, w = (max(factor, math.floor(side / scale) * factor) for side in (height, width))
    elif h * w < lowest:
        scale = math.sqrt(lowest / (height * width)) / factor
        h, w = (math.ceil(side * scale) * factor for side in (height, width))
    return h, w


def check_reader(reader: str) -> None:
    """Raises DataError if there is no such reader of video files, or it is not installed."""
    if reader not in READERS:
        raise DataError(f"there is no reader {reader!r}, but {' and '.join(READERS)}")
    if reader == "decord":
        with error_context("the reader decord needs: pip install decord2", ImportError, OSError):
            import_decord()


@contextmanager
def open_video(video, settings: VideoSettings, reader: str = "av"):
    """A video, the indices of the frames to sample, and the second of each. `video` is a file's
    path, or has total, fps, seconds and frames as `support.frames.Video` has them. Raises
    DataError, naming it, if it is missing or, within the block, no video can be read."""
    video = Path(video) if isinstance(video, str) else video
    with error_context(f"{video}: not a video that can be read", OSError, *ERRORS):
        if isinstance(video, Path):
            video = open_file(video, reader)
        count = smart_nframes(video.total, video.fps, settings)
        indices = torch.linspace(0, video.total - 1, count).round().long().tolist()
        yield video, indices, [video.seconds[index] for index in indices]


def open_file(path: Path, reader: str = "av") -> Video:
    """A video file. Raises DataError, naming it, if it is missing or empty."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    return Video(path, reader)


def read_video(video, settings=VideoSettings(), reader="av") -> tuple[Tensor, list[float]]:
    """The sampled frames of a video (`open_video`), at the size at which the model sees them.

    reader: "decord" lets it decode the files of which it shows the same frames (support/frames.py).
    Returns frames (T, 3, H, W) uint8 with T even, and the second at which each stands. Raises
    DataError, naming it, if no video can be read from it, or if the reader is not installed."""
    check_reader(reader)
    frames = []
    with open_video(video, settings, reader) as (opened, indices, seconds):
        for picture in opened.frames(indices):
            frame = torch.from_numpy(picture).permute(2, 0, 1)[None]
            size = smart_resize(*frame.shape[2:], len(indices), settings)
            if frame.shape[2:] != size:
                frame = F.interpolate(frame.float(), size, mode="bicubic", antialias=True)
                frame = frame.round().clamp(0, 255).byte()
            frames.append(frame)
    return torch.cat(frames), seconds


def sampled_rate(seconds: list[float]) -> float | None:
    """How many of the sampled frames (`read_video`) there are a second, from the second of each:
    (T − 1) / (last − first). None where all are of one moment: a single frame is shown twice."""
    span = seconds[-1] - seconds[0]
    return (len(seconds) - 1) / span if span > 0 else None


def patchify(frames: Tensor, settings: VideoSettings) -> tuple[Tensor, Grid]:
    """Cut frames (T, 3, H, W) into uint8 patches (N, 3 · t · p · p), N = grid_t · grid_h · grid_w,
    as Qwen3-VL orders them: the merge_size² patches that become one token stand together."""
    t, p, m = settings.temporal_patch_size, settings.patch_size, settings.merge_size
    total, channels, height, width = frames.shape
    grid = (total // t, height // p, width // p)
    x = frames.reshape(grid[0], t, channels, grid[1] // m, m, p, grid[2] // m, m, p)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # grid_t, h/m, w/m, m, m, channel, t, p, p
    return x.reshape(math.prod(grid), -1), grid


# ------------------------------
# Prompts


@dataclass
class Sample:
    """A video and its prompt, ready for the model (one row of a Batch).

    fps is the rate at which the frames that the model sees were sampled, in frames a second of
    the video: `sampled_rate` of the seconds that `read_video` gives with them."""

    input_ids: Tensor  # (P,)
    patches: Tensor  # (N, D) uint8
    grid: Grid
    source: Key | None = None  # the video and the prompt it was made of, where both are known
    fps: float | None = None


@dataclass
class Batch:
    """Samples side by side, prompts padded on the right."""

    input_ids: Tensor  # (B, P)
    mask: Tensor  # (B, P) bool, False on padding
    patches: Tensor  # (ΣN, D) uint8; empty once there are features
    grid: Tensor  # (B, 3)
    # What `DeScore.encode` adds: positions, and what the vision tower made of the patches.
    position_ids: Tensor | None = None  # (3, B, P)
    features: tuple[Tensor, list[Tensor]] | None = None
    sources: list[Key] | None = None  # B videos and prompts; None where one is unknown

    def __len__(self) -> int:
        return len(self.input_ids)

    def select(self, rows: list[int]) -> "Batch":
        """Some samples of an encoded batch, with no more padding than they need."""
        if rows == list(range(len(self))):
            return self
        P = int(self.mask[rows].sum(1).max())
        features, levels = self.features
        patches = self.grid.prod(1)
        tokens = (patches * len(features) // patches.sum()).tolist()

        def pick(values: Tensor) -> Tensor:
            parts = values.split(tokens)
            return torch.cat([parts[row] for row in rows])

        sources = self.sources and [self.sources[row] for row in rows]
        return Batch(self.input_ids[rows, :P], self.mask[rows, :P], self.patches, self.grid[rows],
                     self.position_ids[:, rows, :P],
                     (pick(features), [pick(level) for level in levels]), sources)

    def to(self, device: torch.device | str) -> "Batch":
        """On another device."""
        tensors = (self.input_ids, self.mask, self.patches, self.grid, self.position_ids)
        tensors = [None if tensor is None else tensor.to(device) for tensor in tensors]
        features = self.features
        if features:
            features = features[0].to(device), [level.to(device) for level in features[1]]
        return Batch(*tensors, features, self.sources)


class Processor:
    """Turns a video and its prompt into what Qwen3-VL reads: chat format, timestamps, ids.

    Text from users never becomes a special token: "<|im_end|>" in a prompt is just characters.
    (Tokens that a tokenizer merely adds, such as Qwen's "<think>", it may become.)"""

    def __init__(
            self, tokenizer, settings: VideoSettings = VideoSettings(),
            instruction: str | None = INSTRUCTION, dimensions=DIMENSIONS, tags=TAGS, reader="av"):
        """instruction: a text with <video> and <prompt> in it; None where each prompt is itself a
        whole instruction, the video at its <video>, else before it. tags: see `TAGS`. reader: see
        `read_video`; it changes nothing that is read, and is saved nowhere."""
        check_reader(reader)
        self.tokenizer, self.settings, self.reader = tokenizer, settings, reader
        self.dimensions, self.tags = dimensions, tuple(tags)
        self.set_instruction(instruction)
        self.opening = self.template_opening()
        self.special = {}
        for name in ("im_start", "im_end", "vision_start", "vision_end", "video_pad"):
            token = tokenizer.convert_tokens_to_ids(f"<|{name}|>")
            if token in (None, tokenizer.unk_token_id):
                raise DataError(f"{tokenizer.name_or_path}: not a Qwen3-VL tokenizer, it lacks "
                                f"<|{name}|>")
            self.special[f"<|{name}|>"] = token
        self.eos_id, self.video_id = self.special["<|im_end|>"], self.special["<|video_pad|>"]

    def set_instruction(self, instruction: str | None) -> None:
        """Ask with this text from now on; see `__init__`. DataError where it lacks a place."""
        if instruction is not None:
            check_instruction(instruction)
        self.instruction = instruction

    def use_instruction(self, source: str | None) -> None:
        """Ask with the text of a file, or with "problem" with what each prompt of a pair file brings
        itself; None changes nothing."""
        if source is not None:
            self.set_instruction(None if source == "problem" else read_text(Path(source)))

    def template_opening(self) -> str:
        """How the tokenizer's chat template begins the assistant's turn: with nothing, or, as that
        of a -Thinking checkpoint, with the tag that opens the reasoning. DataError for another."""
        if not self.tokenizer.chat_template:
            return ""
        with error_context(f"{self.tokenizer.name_or_path}: its chat template fails", Exception):
            turn = self.tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False,
                                                      add_generation_prompt=True)
        _, start, opening = turn.rpartition("<|im_start|>assistant\n")
        tag = f"<{self.tags[0]}>"
        if not start or not opening.strip():
            return ""
        if opening.strip() != tag:
            raise DataError(f"{self.tokenizer.name_or_path}: its chat template begins an answer with "
                            f"{opening!r}, and CoTs are to begin with {tag}")
        return opening

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, in which no special token is recognised."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_cot(self, cot: str | None) -> list[int]:
        """Token ids of a CoT, none of None. A tag that the prompt has opened is not repeated."""
        cot = cot or ""
        begun = cot.lstrip()
        for opened in (self.opening, self.opening.strip()):
            if opened and begun.startswith(opened):
                return self.encode(begun.removeprefix(opened))
        return self.encode(cot)

    def decode(self, ids: list[int] | Tensor) -> str:
        """The text of a CoT's tokens, up to its end, with the tag that the prompt has opened."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        end = ids.index(self.eos_id) if self.eos_id in ids else len(ids)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=False,
                                     clean_up_tokenization_spaces=False)
        return self.opening + text

    def __call__(self, video, prompt: str) -> Sample:
        """Read a video (`open_video`) and put it into the instruction with its prompt."""
        sample = self.sample(*read_video(video, self.settings, self.reader), prompt)
        return replace(sample, source=(video, prompt))

    def sample(self, frames: Tensor, seconds: list[float], prompt: str) -> Sample:
        """Frames (T, 3, H, W) uint8 and the second of each, as `read_video` returns them, with
        their prompt: the user's turn and the beginning of the assistant's. DataError for frames of
        another type or size."""
        T, s = len(seconds), self.settings
        side = s.patch_size * s.merge_size
        fits = frames.dtype == torch.uint8 and frames.ndim == 4 and frames.shape[:2] == (T, 3)
        odd = T % s.temporal_patch_size or any(length % side for length in frames.shape[2:])
        if not fits or odd or not frames.numel():
            raise DataError(f"{frames.dtype} {tuple(frames.shape)} with {T} times: not frames as "
                            f"read_video makes them, uint8 (T, 3, H, W), sides multiples of {side}")
        patches, grid = patchify(frames, self.settings)
        ids = self.prompt_ids(grid, seconds, prompt)
        return Sample(ids, patches, grid, fps=sampled_rate(seconds))

    def outline(self, video, prompt: str) -> Sample:
        """The sample of a video (`open_video`) without any patches: one frame is decoded."""
        s = self.settings
        with open_video(video, s) as (clip, indices, seconds):
            height, width = smart_resize(*next(clip.frames([0])).shape[:2], len(indices), s)
        p, t = s.patch_size, s.temporal_patch_size
        grid = (len(indices) // t, height // p, width // p)
        ids = self.prompt_ids(grid, seconds, prompt)
        patches = torch.empty(0, 3 * t * p * p, dtype=torch.uint8)
        return Sample(ids, patches, grid, (video, prompt), sampled_rate(seconds))

    def prompt_ids(
            self, grid: Grid, seconds: list[float], prompt: str,
            within_turn: str | None = None) -> Tensor:
        """Token ids (P,) of a video's prompt. With `within_turn`, a CoT, the turn stays the user's
        and holds it: the layout in which DeScore's release scores."""
        checked(prompt, "the prompt")
        if self.instruction is not None:
            texts = self.instruction.split("<video>")
            before, after = (text.replace("<prompt>", prompt) for text in texts)
        elif prompt.count("<video>") == 1:
            before, after = prompt.split("<video>")
        else:
            before, after = "", prompt
        start = self.special["<|im_start|>"]
        rest = [within_turn]
        if within_turn is None:
            rest = [self.eos_id, "\n", start, "assistant\n" + self.opening]
        parts = [start, "user\n" + before, *self.video_parts(grid, seconds), after, *rest]
        ids = []
        # Neighbouring texts are tokenised as one, as the chat template would have it.
        for is_text, some in groupby(parts, lambda part: isinstance(part, str)):
            some = list(some)
            ids += self.encode("".join(some)) if is_text else some
        return torch.tensor(ids)

    def video_parts(self, grid: Grid, seconds: list[float]) -> Iterator[str | int]:
        """Texts and special tokens of a video: for each temporal patch the mean time of its
        frames, then its tokens between their marks (transformers 4.57, `Qwen3VLProcessor`)."""
        frames = self.settings.temporal_patch_size
        tokens = grid[1] * grid[2] // self.settings.merge_size**2
        for first in range(0, grid[0] * frames, frames):
            yield f"<{(seconds[first] + seconds[first + frames - 1]) / 2:.1f} seconds>"
            yield self.special["<|vision_start|>"]
            yield from [self.video_id] * tokens
            yield self.special["<|vision_end|>"]

    def collate(self, samples: list[Sample]) -> Batch:
        """Samples side by side."""
        ids = [sample.input_ids for sample in samples]
        ones = [torch.ones_like(row, dtype=torch.bool) for row in ids]
        sources = [sample.source for sample in samples]
        return Batch(pad_sequence(ids, batch_first=True, padding_value=self.eos_id),
                     pad_sequence(ones, batch_first=True),
                     torch.cat([sample.patches for sample in samples]),
                     torch.tensor([sample.grid for sample in samples]),
                     sources=None if None in sources else sources)


# ------------------------------
# Chains of thought


def follows_format(text: str, dimensions=DIMENSIONS, tags=TAGS) -> bool:
    """Whether a CoT keeps the format exactly, which R_f pays for: one <think> block with something
    in it, then one <answer> block that `parse_cot` can read, and only white space around them."""
    think, answer = tags
    blocks = re.fullmatch(rf"\s*<{think}>(.*?)</{think}>\s*<{answer}>.*</{answer}>\s*", text, re.DOTALL)
    count = len(re.findall(rf"</?(?:{think}|{answer})>", text))
    says_something = blocks is not None and blocks[1].strip() != ""
    return says_something and count == 4 and parse_cot(text, dimensions, tags) is not None


def parse_cot(text: str, dimensions=DIMENSIONS, tags=TAGS) -> dict | None:
    """The scores a CoT ends with: {"dimensional_scores": {...}, "overall_score": float | None},
    and whatever else its answer says. Sub-scores that are quoted ("2") become numbers.

    None unless the text holds exactly one <answer> block and this holds one JSON object (in a
    ```json fence or not) with a valid sub-score for each dimension and no other, and an
    overall_score in [1, 5] if any."""
    opening, closing = f"<{tags[1]}>", f"</{tags[1]}>"
    if text.count(opening) != 1:
        return None
    answer, closed, _ = text.partition(opening)[2].partition(closing)
    if not closed:
        return None
    answer = answer.strip()
    if answer.startswith("```") and answer.endswith("```") and len(answer) >= 6:
        answer = answer[3:-3].removeprefix("json")
    try:
        answer = json.loads(answer, object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict):
        return None
    scores = read_scores(answer.get("dimensional_scores"), dimensions)
    if scores is None:
        return None
    overall = answer.get("overall_score")
    if "overall_score" in answer and not (is_number(overall) and 1 <= overall <= 5):
        return None
    overall = None if overall is None else float(overall)
    return answer | {"dimensional_scores": scores, "overall_score": overall}


def no_duplicates(items: list[tuple[str, object]]) -> dict:
    """A JSON object that says each thing once; ValueError where something stands twice."""
    if len(dict(items)) < len(items):
        raise ValueError("a key stands twice")
    return dict(items)


def no_constant(name: str):
    """ValueError for NaN and Infinity, which Python reads and JSON does not know."""
    raise ValueError(f"{name} is not JSON")


# What a sub-score may be, as a number or as text, and what it is read as.
SUB_SCORES = {0: 0, 1: 1, 2: 2, "0": 0, "1": 1, "2": 2, "N/A": "N/A"}


def read_scores(scores, dimensions=DIMENSIONS) -> dict | None:
    """Sub-scores, 0, 1, 2 or "N/A", of each dimension; "0", "1" and "2" become numbers. None where a
    dimension is missing, another stands there, or a sub-score is anything else."""
    if not isinstance(scores, dict) or set(scores) != set(dimensions):
        return None
    numbers = {}
    for name, value in scores.items():
        could_be = isinstance(value, str) or is_number(value)
        if not could_be or value not in SUB_SCORES:
            return None
        numbers[name] = SUB_SCORES[value]
    return numbers


def agreement(scores: dict, reference: dict) -> float:
    """Share of the reference sub-scores that are matched exactly, "N/A" included: [0, 1]."""
    matched = [scores.get(dimension) == value for dimension, value in reference.items()]
    return sum(matched) / len(matched)


def overall_score(scores: dict, dimensions=DIMENSIONS) -> float | None:
    """An overall score in [1, 5] from sub-scores: their weighted mean, "N/A" left out, so that 0
    maps to 1 and 2 to 5. None where every dimension is "N/A"."""
    asked = [name for name, value in scores.items() if value != "N/A"]
    if not asked:
        return None
    total = sum(dimensions[name] * scores[name] for name in asked)
    return 1 + 2 * total / sum(dimensions[name] for name in asked)


def implied_overall(text: str, dimensions=DIMENSIONS, tags=TAGS) -> float | None:
    """What a CoT says of its video, 1 to 5: its overall_score, else its weighted sub-scores."""
    return overall_of(parse_cot(text, dimensions, tags), dimensions)


def overall_of(cot: dict | None, dimensions=DIMENSIONS) -> float | None:
    """The same of a CoT that has been read; None where it could not be."""
    if cot is None or cot["overall_score"] is not None:
        return cot and cot["overall_score"]
    return overall_score(cot["dimensional_scores"], dimensions)


# ------------------------------
# Preference pairs


@dataclass
class Pair:
    """Two videos for one prompt, and which of them a human preferred."""

    prompt: str
    video_a: str  # resolved: relative paths in a file are relative to that file
    video_b: str
    preference: str  # "A", "B" or "tie"
    cot_a: str | None = None
    cot_b: str | None = None
    scores_a: dict | None = None  # reference sub-scores
    scores_b: dict | None = None
    model_a: str | None = None  # which generator made the video
    model_b: str | None = None
    problem: str | None = None  # the whole instruction, where a file brings its own
    overall_a: float | None = None  # in [1, 5], of whoever saw both videos (annotate --together)
    overall_b: float | None = None

    @property
    def human(self) -> int:
        """+1 (A is better), -1 (B is better), 0 (tie)."""
        return {"A": 1, "B": -1, "tie": 0}[self.preference]

    def videos(self) -> list[Key]:
        """The (video, prompt) keys by which its judgements are known."""
        return [(self.video_a, self.prompt), (self.video_b, self.prompt)]

    def winner_first(self) -> "Pair":
        """The same pair with the preferred video as A. A tie stays as it is."""
        if self.preference != "B":
            return self
        swapped = {"preference": "A"}
        for name in ("video", "cot", "scores", "overall", "model"):
            swapped[f"{name}_a"] = getattr(self, f"{name}_b")
            swapped[f"{name}_b"] = getattr(self, f"{name}_a")
        return replace(self, **swapped)


def keys_of(pairs: list[Pair]) -> list[Key]:
    """The (video, prompt) keys of all pairs: pair 1's A, pair 1's B, pair 2's A, …"""
    return list(chain.from_iterable(map(Pair.videos, pairs)))


def per_video(pairs: list[Pair], field: str) -> list:
    """What the pairs say of their videos, such as "cot", in the order of `keys_of`."""
    values = []
    for pair in pairs:
        values += [getattr(pair, f"{field}_a"), getattr(pair, f"{field}_b")]
    return values


class Pairs(list):
    """The pairs of a file, and which of its rows were left out and why."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.left_out = path, []  # [{"row": 3, "reason": "missing", "detail": "…"}]

    def summary(self) -> str:
        """How many pairs there are, how many rows were left out, the first few by name."""
        text = f"{self.path}: {len(self)} pairs"
        for reason, count in Counter(row["reason"] for row in self.left_out).items():
            rows = [row for row in self.left_out if row["reason"] == reason]
            named = [f"row {row['row']} {row['detail']}".strip() for row in rows[:5]]
            text += f"; {count} left out, {reason}: {', '.join(named)}" + ", …" * (count > 5)
        return text


def read_pairs(path: str | Path, root: Path | None = None, dimensions=DIMENSIONS) -> Pairs:
    """Read a pair file in our own format, a JSON object a line; others: support/formats.py.
    Paths are relative to `root`, by default the file's own folder.

    Rows whose videos are missing are left out and listed. Raises DataError, naming the file and
    the row, for anything that cannot be understood."""
    path = Path(path)
    return collect(path, json_records(read_text(path), path), root, dimensions)


def read_text(path: Path) -> str:
    """A text file. Raises DataError, naming it, if missing or not UTF-8."""
    if not path.is_file():
        raise DataError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}")
    with error_context(f"{path}: not UTF-8 text", UnicodeDecodeError):
        return path.read_text(encoding="utf-8-sig")


def json_records(text: str, path: Path) -> Iterator[tuple[int, dict]]:
    """The rows of our own format, with their numbers."""
    # Lines end at "\n", not at what else Unicode calls the end of a line.
    for row, line in enumerate(text.split("\n"), 1):
        if line.strip():
            with error_context(f"{path}, row {row}: not JSON", ValueError, RecursionError):
                record = json.loads(line, object_pairs_hook=no_duplicates)
            if not isinstance(record, dict):
                raise DataError(f"{path}, row {row}: not a JSON object")
            yield row, record | {"preference": record.get("preference") or ""}


def collect(path: Path, records: Iterable, root: Path | None, dimensions=DIMENSIONS) -> Pairs:
    """Pairs of numbered records; those without a preference (None), and those whose videos are
    missing, are left out and listed. Raises DataError where nothing is left."""
    pairs = Pairs(path)
    for row, record in records:
        reason, detail = "invalid", ""
        if record["preference"] is not None:
            pair = make_pair(record, f"{path}, row {row}", Path(root or path.parent), dimensions)
            missing = [video for video, _ in pair.videos() if not os.path.isfile(video)]
            if not missing:
                pairs.append(pair)
                continue
            reason, detail = "missing", missing[0]
        pairs.left_out.append({"row": row, "reason": reason, "detail": detail})
    if not pairs:
        raise DataError(f"{pairs.summary()}: nothing to work on")
    return pairs


def make_pair(record: dict, where: str, root: Path, dimensions=DIMENSIONS) -> Pair:
    """Check one record and resolve its paths. `where` names it in errors."""
    for key in ("prompt", "video_a", "video_b"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise DataError(f"{where}: {key!r} is missing or not a text")
    if record["preference"] not in ("A", "B", "tie"):
        preference = record["preference"]
        raise DataError(f"{where}: preference is {preference!r}, not 'A', 'B' or 'tie'")
    references = {}
    for key in ("scores_a", "scores_b"):
        references[key] = read_scores(record.get(key), dimensions)
        if record.get(key) is not None and references[key] is None:
            names = ", ".join(dimensions)
            raise DataError(f'{where}: {key} is not 0, 1, 2 or "N/A" for each of {names}')
    for key in ("overall_a", "overall_b"):
        overall = record.get(key)
        if overall is not None and not (is_number(overall) and 1 <= overall <= 5):
            raise DataError(f"{where}: {key} is not a number from 1 to 5")
    for key in ("cot_a", "cot_b", "model_a", "model_b", "problem"):
        if not isinstance(record.get(key), (str, type(None))):
            raise DataError(f"{where}: {key} is not a text")
    known = {field.name: record.get(field.name) for field in fields(Pair)}
    for key, value in known.items():
        if isinstance(value, str):
            checked(value, f"{where}: {key}")
    videos = {key: str(root / record[key]) for key in ("video_a", "video_b")}
    return Pair(**known | references | videos)


if __name__ == "__main__":
    command = " ".join(sys.argv[1:2]) or "check"
    print(f"error: data.py {command} is now python -m support.{command}", file=sys.stderr)
    sys.exit(2)
