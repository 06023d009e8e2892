"""From files to tensors: videos, prompts, chains of thought, preference pairs.

Everything a Qwen3-VL reads is made here, token for token and pixel for pixel as its own
pipeline makes it (qwen-vl-utils 0.0.14, the processor of transformers 4.57).
"""

import codecs
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from support.above import NotHere, from_above
from support.frames import ERRORS, READERS, Video

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
    primary = [name for name in dimensions if dimensions[name] > 1]
    secondary = [name for name in dimensions if name not in primary]
    lists = []
    if primary:
        lists.append(f"{in_words(primary)} (primary)")
    if secondary:
        lists.append(f"{in_words(secondary)} (secondary)")
    # The example has a sub-score of each kind, and goes round where there are more dimensions.
    sub_scores = (2, 1, "N/A", 2, 0) * len(dimensions)
    example = dict(zip(dimensions, sub_scores))
    think, answer = tags
    text = TASK.replace("<dimensions>", ", ".join(lists))
    text = text.replace("<think-tags>", f"<{think}> </{think}>")
    text = text.replace("<answer-tags>", f"<{answer}> </{answer}>")
    return text.replace("<example>", json.dumps(example))


def in_words(names: list[str]) -> str:
    """Names as a sentence has them: "a", "a and b", "a, b and c"."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


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
    except (DataError, NotHere):
        raise
    except kinds as error:
        reason = str(error).strip() or type(error).__name__
        first_line = reason.splitlines()[0]
        raise DataError(f"{message} ({first_line[:200]})") from error


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
        for setting in fields(self):
            value = getattr(self, setting.name)
            fits = is_number(value) and isinstance(value, (int, setting.type))
            if not fits or not 0 < value < math.inf:
                raise TypeError(f"{setting.name} is {value!r}")
        if self.max_frames < 2:
            raise TypeError("max_frames is 1")
        for unit in ("frames", "pixels"):
            lowest = getattr(self, f"min_{unit}")
            highest = getattr(self, f"max_{unit}")
            if highest < lowest:
                raise TypeError(f"max_{unit} is {highest}, below min_{unit}, {lowest}")


def smart_nframes(total: int, video_fps: float, settings: VideoSettings) -> int:
    """How many of `total` frames to sample: an even number (qwen-vl-utils, `smart_nframes`).
    A single frame, which it refuses, is shown twice, as Qwen3-VL shows an image."""
    if total < 2:
        return 2
    lowest = math.ceil(settings.min_frames / 2) * 2
    highest = math.floor(min(settings.max_frames, total) / 2) * 2
    seconds = total / video_fps
    wanted = max(seconds * settings.fps, lowest)
    return math.floor(min(wanted, highest, total) / 2) * 2


def smart_resize(height: int, width: int, frames: int, settings: VideoSettings) -> tuple[int, int]:
    """The size (h, w) at which the model sees a frame: sides that are multiples of
    patch_size · merge_size, pixels within bounds, the shape nearly kept (qwen-vl-utils,
    `smart_resize`). ValueError for a frame that is hardly more than a line."""
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"{width} x {height} pixels: one side is over 200 times the other")
    factor = settings.patch_size * settings.merge_size  # the side of what becomes one token
    lowest = settings.min_pixels
    share = settings.total_pixels / frames * 2  # qwen-vl-utils counts two frames as one
    highest = min(settings.max_pixels, max(share, int(lowest * 1.05)))
    h = max(factor, round(height / factor) * factor)
    w = max(factor, round(width / factor) * factor)
    if h * w > highest:
        shrink = math.sqrt(height * width / highest)
        h = max(factor, math.floor(height / (shrink * factor)) * factor)
        w = max(factor, math.floor(width / (shrink * factor)) * factor)
    elif h * w < lowest:
        grow = math.sqrt(lowest / (height * width))
        h = math.ceil(height * (grow / factor)) * factor
        w = math.ceil(width * (grow / factor)) * factor
    return h, w


def check_reader(reader: str) -> None:
    """Raises DataError if there is no such reader of video files, or it is not installed."""
    if reader not in READERS:
        raise DataError(f"there is no reader {reader!r}, but {' and '.join(READERS)}")
    if reader == "decord":
        import_decord = from_above("tools.decord_reader", "import_decord")
        with error_context("the reader decord needs: pip install decord2", ImportError, OSError):
            import_decord()


@contextmanager
def open_video(video, settings: VideoSettings, reader: str = "av"):
    """A video, the indices of the frames to sample, and the second of each. `video` is a file's
    path, or has total, fps, seconds and frames as `support.frames.Video` has them. Raises
    DataError, naming it, if it is missing or, within the block, no video can be read."""
    if isinstance(video, str):
        video = Path(video)
    with error_context(f"{video}: not a video that can be read", OSError, *ERRORS):
        if isinstance(video, Path):
            video = open_file(video, reader)
        count = smart_nframes(video.total, video.fps, settings)
        # Evenly spread from the first frame to the last, as qwen-vl-utils takes them.
        places = torch.linspace(0, video.total - 1, count)
        indices = places.round().long().tolist()
        yield video, indices, [video.seconds[index] for index in indices]


def open_file(path: Path, reader: str = "av") -> Video:
    """A video file. Raises DataError, naming it, if it is missing or empty."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    if reader == "decord":
        return from_above("tools.decord_reader", "DecordVideo")(path)
    return Video(path)


def read_video(video, settings=VideoSettings(), reader="av") -> tuple[Tensor, list[float]]:
    """The sampled frames of a video (`open_video`), at the size at which the model sees them.

    reader: "decord" lets it decode the files of which it shows the same frames, as PyAV does
    ("av") all others (tools/decord_reader.py). Returns frames (T, 3, H, W) uint8 with T even, and
    the second at which each stands. Raises DataError, naming it, if no video can be read from it,
    or if the reader is not installed."""
    check_reader(reader)
    frames = []
    with open_video(video, settings, reader) as (opened, indices, seconds):
        for picture in opened.frames(indices):
            frame = torch.from_numpy(picture).permute(2, 0, 1)[None]  # (1, 3, height, width)
            height, width = frame.shape[2:]
            # Resized one by one: all frames at their own size may not fit in memory.
            size = smart_resize(height, width, len(indices), settings)
            if frame.shape[2:] != size:
                frame = F.interpolate(frame.float(), size, mode="bicubic", antialias=True)
                frame = frame.round().clamp(0, 255).byte()
            frames.append(frame)
    return torch.cat(frames), seconds


def sampled_rate(seconds: list[float]) -> float | None:
    """How many of the sampled frames (`read_video`) there are a second, from the second of each:
    (T − 1) / (last − first). None where all are of one moment: a single frame is shown twice."""
    duration = seconds[-1] - seconds[0]
    steps = len(seconds) - 1
    return steps / duration if duration > 0 else None


def patchify(frames: Tensor, settings: VideoSettings) -> tuple[Tensor, Grid]:
    """Cut frames (T, 3, H, W) into uint8 patches (N, 3 · t · p · p), with N = grid_t · grid_h ·
    grid_w, as Qwen3-VL orders them: the merge_size² patches of one token stand together."""
    t = settings.temporal_patch_size
    p = settings.patch_size
    m = settings.merge_size
    total, channels, height, width = frames.shape
    grid_t = total // t
    grid_h = height // p
    grid_w = width // p
    # Each side is cut twice: into tokens, and a token into m patches of p pixels.
    x = frames.reshape(
        grid_t, t,
        channels,
        grid_h // m, m, p,
        grid_w // m, m, p)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # grid_t, h/m, w/m, m, m, channel, t, p, p
    return x.reshape(grid_t * grid_h * grid_w, -1), (grid_t, grid_h, grid_w)


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
        # Features of all videos stand one after the other: a token for every merge_size² patches.
        pooled, levels = self.features
        patches = self.grid.prod(1)  # (B,)
        tokens = patches * len(pooled) // patches.sum()

        def pick(features: Tensor) -> Tensor:
            videos = features.split(tokens.tolist())
            return torch.cat([videos[row] for row in rows])

        sources = None
        if self.sources is not None:
            sources = [self.sources[row] for row in rows]
        return replace(
            self,
            input_ids=self.input_ids[rows, :P],
            mask=self.mask[rows, :P],
            grid=self.grid[rows],
            position_ids=self.position_ids[:, rows, :P],
            features=(pick(pooled), [pick(level) for level in levels]),
            sources=sources)

    def to(self, device: torch.device | str) -> "Batch":
        """On another device."""
        moved = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device)
        if self.features is not None:
            pooled, levels = self.features
            moved["features"] = (pooled.to(device), [level.to(device) for level in levels])
        return replace(self, **moved)


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
        self.tokenizer = tokenizer
        self.settings = settings
        self.reader = reader
        self.dimensions = dimensions
        self.tags = tuple(tags)
        self.set_instruction(instruction)
        self.opening = self.template_opening()
        self.special: dict[str, int] = {}  # "<|im_start|>" → its id
        for name in ("im_start", "im_end", "vision_start", "vision_end", "video_pad"):
            token = tokenizer.convert_tokens_to_ids(f"<|{name}|>")
            if token in (None, tokenizer.unk_token_id):
                raise DataError(f"{tokenizer.name_or_path}: not a Qwen3-VL tokenizer, it lacks "
                                f"<|{name}|>")
            self.special[f"<|{name}|>"] = token
        self.eos_id = self.special["<|im_end|>"]
        self.video_id = self.special["<|video_pad|>"]

    def set_instruction(self, instruction: str | None) -> None:
        """Ask with this text from now on; see `__init__`. DataError where it lacks a place."""
        if instruction is not None:
            check_instruction(instruction)
        self.instruction = instruction

    def use_instruction(self, source: str | None) -> None:
        """Ask with the text of a file; with "problem", with what each prompt of a pair file
        brings itself; with None, as before."""
        if source == "problem":
            self.set_instruction(None)
        elif source is not None:
            self.set_instruction(read_text(Path(source)))

    def template_opening(self) -> str:
        """How the tokenizer's chat template begins the assistant's turn: with nothing, or, as that
        of a -Thinking checkpoint, with the tag that opens the reasoning. DataError for another."""
        if not self.tokenizer.chat_template:
            return ""
        name = self.tokenizer.name_or_path
        question = [{"role": "user", "content": "?"}]
        with error_context(f"{name}: its chat template fails", Exception):
            turns = self.tokenizer.apply_chat_template(
                question, tokenize=False, add_generation_prompt=True)
        _, start, opening = turns.rpartition("<|im_start|>assistant\n")
        if not start or not opening.strip():
            return ""
        tag = f"<{self.tags[0]}>"
        if opening.strip() != tag:
            raise DataError(f"{name}: its chat template begins an answer with "
                            f"{opening!r}, and CoTs are to begin with {tag}")
        return opening

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, in which no special token is recognised."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_cot(self, cot: str | None) -> list[int]:
        """Token ids of a CoT, none of None. A tag that the prompt has opened is not repeated."""
        cot = cot or ""
        begun = cot.lstrip()
        # With the white space that the template puts behind the tag, or without it.
        for opened in (self.opening, self.opening.strip()):
            if opened and begun.startswith(opened):
                return self.encode(begun.removeprefix(opened))
        return self.encode(cot)

    def decode(self, ids: list[int] | Tensor) -> str:
        """The text of a CoT's tokens, up to its end, with the tag that the prompt has opened."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        text = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return self.opening + text

    def __call__(self, video, prompt: str) -> Sample:
        """Read a video (`open_video`) and put it into the instruction with its prompt."""
        frames, seconds = read_video(video, self.settings, self.reader)
        sample = self.sample(frames, seconds, prompt)
        return replace(sample, source=(video, prompt))

    def sample(self, frames: Tensor, seconds: list[float], prompt: str) -> Sample:
        """Frames (T, 3, H, W) uint8 and the second of each, as `read_video` returns them, with
        their prompt: the user's turn and the beginning of the assistant's. DataError for frames of
        another type or size."""
        T = len(seconds)
        side = self.settings.patch_size * self.settings.merge_size
        are_pictures = frames.dtype == torch.uint8 and frames.ndim == 4
        fits = are_pictures and frames.shape[:2] == (T, 3)
        odd_count = T % self.settings.temporal_patch_size
        odd_sides = any(length % side for length in frames.shape[2:])
        if not fits or odd_count or odd_sides or not frames.numel():
            shape = tuple(frames.shape)
            raise DataError(f"{frames.dtype} {shape} with {T} times: not frames as "
                            f"read_video makes them, uint8 (T, 3, H, W), sides multiples of {side}")
        patches, grid = patchify(frames, self.settings)
        ids = self.prompt_ids(grid, seconds, prompt)
        return Sample(ids, patches, grid, fps=sampled_rate(seconds))

    def outline(self, video, prompt: str) -> Sample:
        """The sample of a video (`open_video`) without any patches: one frame is decoded."""
        with open_video(video, self.settings) as (clip, indices, seconds):
            picture = next(clip.frames([0]))  # all are of one size
            height, width, _ = picture.shape
            height, width = smart_resize(height, width, len(indices), self.settings)
        p = self.settings.patch_size
        t = self.settings.temporal_patch_size
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
        before, after = self.around_video(prompt)
        start = self.special["<|im_start|>"]
        parts = [start, "user\n" + before, *self.video_parts(grid, seconds), after]
        if within_turn is None:
            parts += [self.eos_id, "\n", start, "assistant\n" + self.opening]
        else:
            parts.append(within_turn)
        ids = []
        # Neighbouring texts are tokenised as one, as the chat template would have it.
        for is_text, neighbours in groupby(parts, lambda part: isinstance(part, str)):
            if is_text:
                ids += self.encode("".join(neighbours))
            else:
                ids += neighbours
        return torch.tensor(ids)

    def around_video(self, prompt: str) -> tuple[str, str]:
        """The texts before a video and behind it."""
        if self.instruction is not None:
            # Split first: a "<video>" in the prompt is just characters.
            before, after = self.instruction.split("<video>")
            return before.replace("<prompt>", prompt), after.replace("<prompt>", prompt)
        if prompt.count("<video>") == 1:
            before, after = prompt.split("<video>")
            return before, after
        return "", prompt

    def video_parts(self, grid: Grid, seconds: list[float]) -> Iterator[str | int]:
        """Texts and special tokens of a video: for each temporal patch the mean time of its
        frames, then its tokens between their marks (transformers 4.57, `Qwen3VLProcessor`)."""
        grid_t, grid_h, grid_w = grid
        frames = self.settings.temporal_patch_size
        tokens = grid_h * grid_w // self.settings.merge_size**2
        for first in range(0, grid_t * frames, frames):
            last = first + frames - 1
            mean = (seconds[first] + seconds[last]) / 2
            yield f"<{mean:.1f} seconds>"
            yield self.special["<|vision_start|>"]
            yield from [self.video_id] * tokens
            yield self.special["<|vision_end|>"]

    def collate(self, samples: list[Sample]) -> Batch:
        """Samples side by side."""
        ids = [sample.input_ids for sample in samples]
        ones = [torch.ones_like(row, dtype=torch.bool) for row in ids]
        sources = [sample.source for sample in samples]
        return Batch(
            input_ids=pad_sequence(ids, batch_first=True, padding_value=self.eos_id),
            mask=pad_sequence(ones, batch_first=True),
            patches=torch.cat([sample.patches for sample in samples]),
            grid=torch.tensor([sample.grid for sample in samples]),
            sources=None if None in sources else sources)


# ------------------------------
# Chains of thought


def follows_format(text: str, dimensions=DIMENSIONS, tags=TAGS) -> bool:
    """Whether a CoT keeps the format exactly, which R_f pays for: one <think> block with something
    in it, then one <answer> block that `parse_cot` can read, and only white space around them."""
    think, answer = tags
    pattern = rf"\s*<{think}>(.*?)</{think}>\s*<{answer}>.*</{answer}>\s*"
    blocks = re.fullmatch(pattern, text, re.DOTALL)
    says_something = blocks is not None and blocks[1].strip() != ""
    # Each of the four tags once: not a second block within the first, nor a tag in the reasoning.
    count = len(re.findall(rf"</?(?:{think}|{answer})>", text))
    return says_something and count == 4 and parse_cot(text, dimensions, tags) is not None


def parse_cot(text: str, dimensions=DIMENSIONS, tags=TAGS) -> dict | None:
    """The scores a CoT ends with: {"dimensional_scores": {...}, "overall_score": float | None},
    and whatever else its answer says. Sub-scores that are quoted ("2") become numbers.

    None unless the text holds exactly one <answer> block and this holds one JSON object (in a
    ```json fence or not) with a valid sub-score for each dimension and no other, and an
    overall_score in [1, 5] if any."""
    block = answer_block(text, tags[1])
    if block is None:
        return None
    try:
        answer = json.loads(block, object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict):
        return None
    scores = read_scores(answer.get("dimensional_scores"), dimensions)
    if scores is None:
        return None
    overall = None
    if "overall_score" in answer:
        overall = answer["overall_score"]
        if not is_number(overall) or not 1 <= overall <= 5:
            return None
        overall = float(overall)
    return answer | {"dimensional_scores": scores, "overall_score": overall}


def answer_block(text: str, tag: str) -> str | None:
    """What stands in the one block of this tag, without a fence; None if there is no such block."""
    if text.count(f"<{tag}>") != 1:
        return None
    _, _, rest = text.partition(f"<{tag}>")
    block, closing, _ = rest.partition(f"</{tag}>")
    if not closing:
        return None
    block = block.strip()
    if block.startswith("```") and block.endswith("```") and len(block) >= 6:
        block = block[3:-3].removeprefix("json")
    return block


def no_duplicates(items: list[tuple[str, object]]) -> dict:
    """A JSON object that says each thing once; ValueError where something stands twice."""
    record = dict(items)
    if len(record) < len(items):
        raise ValueError("a key stands twice")
    return record


def no_constant(name: str):
    """ValueError for NaN and Infinity, which Python reads and JSON does not know."""
    raise ValueError(f"{name} is not JSON")


# What a sub-score may be, as a number or as text, and what it is read as.
SUB_SCORES = {0: 0, 1: 1, 2: 2, "0": 0, "1": 1, "2": 2, "N/A": "N/A"}


def read_scores(scores, dimensions=DIMENSIONS) -> dict | None:
    """Sub-scores, 0, 1, 2 or "N/A", of each dimension; "0", "1" and "2" become numbers. None
    where a dimension is missing, another stands there, or a sub-score is anything else."""
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
    matched = [scores.get(name) == value for name, value in reference.items()]
    return sum(matched) / len(matched)


def overall_score(scores: dict, dimensions=DIMENSIONS) -> float | None:
    """An overall score in [1, 5] from sub-scores: their weighted mean, "N/A" left out, so that 0
    maps to 1 and 2 to 5. None where every dimension is "N/A"."""
    asked = [name for name, value in scores.items() if value != "N/A"]
    if not asked:
        return None
    total = sum(dimensions[name] * scores[name] for name in asked)
    most = sum(dimensions[name] for name in asked)
    return 1 + 2 * total / most


def implied_overall(text: str, dimensions=DIMENSIONS, tags=TAGS) -> float | None:
    """What a CoT says of its video, 1 to 5: its overall_score, else its weighted sub-scores."""
    return overall_of(parse_cot(text, dimensions, tags), dimensions)


def overall_of(cot: dict | None, dimensions=DIMENSIONS) -> float | None:
    """The same of a CoT that has been read; None where it could not be."""
    if cot is None:
        return None
    if cot["overall_score"] is not None:
        return cot["overall_score"]
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
    row: int | None = field(default=None, compare=False)  # where it stands in its file

    @property
    def human(self) -> int:
        """+1 (A is better), -1 (B is better), 0 (tie)."""
        return {"A": 1, "B": -1, "tie": 0}[self.preference]

    def videos(self) -> list[Key]:
        """The (video, prompt) keys by which its judgements are known."""
        return [(self.video_a, self.prompt), (self.video_b, self.prompt)]

    def said(self, field: str) -> list:
        """What it says of each of its videos, in their order: `said("cot")` is [cot_a, cot_b]."""
        return [getattr(self, f"{field}_a"), getattr(self, f"{field}_b")]

    def masked(self) -> "Pair":
        """The same pair without its CoTs."""
        return replace(self, cot_a=None, cot_b=None)

    def winner_first(self) -> "Pair":
        """The same pair with the preferred video as A. A tie stays as it is."""
        if self.preference != "B":
            return self
        swapped = {"preference": "A"}
        for name in ("video", "cot", "scores", "overall", "model"):
            swapped[f"{name}_a"] = getattr(self, f"{name}_b")
            swapped[f"{name}_b"] = getattr(self, f"{name}_a")
        return replace(self, **swapped)


class Item(Protocol):
    """What is learnt from: a `Pair`, or another dataclass that has videos, one or several, and says
    something of each; each video is a row of its own. Reading, batches and budgets ask no more of it
    than this; a stage's loss and its evaluation do. One with a `row` is known by it in its file."""

    def videos(self) -> list[Key]:
        """Its (video, prompt) keys."""

    def said(self, field: str) -> list:
        """What it says of each of its videos, such as "cot", in the order of `videos`."""


def keys_of(items: Iterable[Item]) -> list[Key]:
    """The (video, prompt) keys of all items: of pairs pair 1's A, pair 1's B, pair 2's A, …"""
    keys = []
    for item in items:
        keys += item.videos()
    return keys


def per_video(items: Iterable[Item], field: str) -> list:
    """What the items say of their videos, such as "cot", in the order of `keys_of`."""
    values = []
    for item in items:
        values += item.said(field)
    return values


class Pairs(list):
    """The pairs of a file, and which of its rows were left out and why."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.left_out: list[dict] = []  # [{"row": 3, "reason": "missing", "detail": "…"}]

    def summary(self) -> str:
        """How many pairs there are, how many rows were left out, the first few by name."""
        rows: dict[str, list[str]] = {}  # by the reason why they were left out
        for row in self.left_out:
            name = f"row {row['row']} {row['detail']}".strip()
            rows.setdefault(row["reason"], []).append(name)
        text = f"{self.path}: {len(self)} pairs"
        for reason, names in rows.items():
            text += f"; {len(names)} left out, {reason}: {', '.join(names[:5])}"
            if len(names) > 5:
                text += ", …"
        return text


def read_pairs(path: str | Path, root: Path | None = None, dimensions=DIMENSIONS) -> Pairs:
    """Read a pair file in our own format, a JSON object a line; others: support/formats.py.
    Paths are relative to `root`, by default the file's own folder.

    Rows whose videos are missing are left out and listed. Raises DataError, naming the file and
    the row, for anything that cannot be understood."""
    path = Path(path)
    records = json_records(read_text(path), path)
    return collect(path, records, root, dimensions)


def read_text(path: Path) -> str:
    """A text file: UTF-8, or UTF-16 that begins with its mark, as a spreadsheet writes it. Raises
    DataError, naming it, if missing or neither."""
    if not path.is_file():
        reason = "is a directory" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {reason}")
    with path.open("rb") as file:
        is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    with error_context(f"{path}: not UTF-8 text, nor UTF-16 with its mark", UnicodeDecodeError):
        return path.read_text(encoding="utf-16" if is_utf16 else "utf-8-sig")


def json_records(text: str, path: Path) -> Iterator[tuple[int, dict]]:
    """The rows of our own format, with their numbers."""
    # Lines end at "\n", not at what else Unicode calls the end of a line.
    for row, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        with error_context(f"{path}, row {row}: not JSON", ValueError, RecursionError):
            record = json.loads(line, object_pairs_hook=no_duplicates)
        if not isinstance(record, dict):
            raise DataError(f"{path}, row {row}: not a JSON object")
        # None would say that the row was marked invalid; `make_pair` refuses an empty one.
        record["preference"] = record.get("preference") or ""
        yield row, record


def collect(path: Path, records: Iterable, root: Path | None, dimensions=DIMENSIONS) -> Pairs:
    """Pairs of numbered records; those without a preference (None), those that prefer a video to
    itself, and those whose videos are missing, are left out and listed. Raises DataError where
    nothing is left."""
    pairs = Pairs(path)
    folder = Path(root or path.parent)
    for row, record in records:
        if record["preference"] is None:
            pairs.left_out.append({"row": row, "reason": "invalid", "detail": ""})
            continue
        pair = make_pair(record, f"{path}, row {row}", folder, dimensions)
        pair.row = row
        missing = [video for video, _ in pair.videos() if not os.path.isfile(video)]
        if missing:
            pairs.left_out.append({"row": row, "reason": "missing", "detail": missing[0]})
        elif pair.human and os.path.samefile(pair.video_a, pair.video_b):
            reason = "a video preferred to itself"
            pairs.left_out.append({"row": row, "reason": reason, "detail": pair.video_a})
        else:
            pairs.append(pair)
    if not pairs:
        raise DataError(f"{pairs.summary()}: nothing to work on")
    return pairs


def make_pair(record: dict, where: str, root: Path, dimensions=DIMENSIONS) -> Pair:
    """Check one record and resolve its paths. `where` names it in errors."""
    for key in ("prompt", "video_a", "video_b"):
        text = record.get(key)
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: {key!r} is missing or not a text")
    preference = record["preference"]
    if preference not in ("A", "B", "tie"):
        raise DataError(f"{where}: preference is {preference!r}, not 'A', 'B' or 'tie'")
    known = {field.name: record.get(field.name) for field in fields(Pair)}
    for key in ("scores_a", "scores_b"):
        scores = read_scores(record.get(key), dimensions)
        if scores is None and record.get(key) is not None:
            names = ", ".join(dimensions)
            raise DataError(f'{where}: {key} is not 0, 1, 2 or "N/A" for each of {names}')
        known[key] = scores
    for key in ("overall_a", "overall_b"):
        overall = record.get(key)
        if overall is not None and not (is_number(overall) and 1 <= overall <= 5):
            raise DataError(f"{where}: {key} is not a number from 1 to 5")
    for key in ("cot_a", "cot_b", "model_a", "model_b", "problem"):
        if not isinstance(record.get(key), (str, type(None))):
            raise DataError(f"{where}: {key} is not a text")
        if not (known[key] or "").strip():
            known[key] = None  # an empty cell of a table
    for key, value in known.items():
        if isinstance(value, str):
            checked(value, f"{where}: {key}")
    for key in ("video_a", "video_b"):
        known[key] = str(root / record[key])
    return Pair(**known)


if __name__ == "__main__":
    command = " ".join(sys.argv[1:2]) or "check"
    print(f"error: data.py {command} is now python -m tools.{command}", file=sys.stderr)
    sys.exit(2)
