"""From files to tensors: videos, prompts, chains of thought, preference pairs.

Everything a Qwen3-VL reads is made here, token for token and pixel for pixel as its own pipeline makes it
(qwen-vl-utils 0.0.14 and the processor of transformers 4.57), with no torchvision. Also a small command line:

    python data.py check PAIRS                          # open every video of a pair file, say what is broken
    python data.py convert PAIRS OUT                      # any known pair format to our own
    python data.py annotate PAIRS OUT --model BACKBONE    # let a model write a CoT for every video
    python data.py filter PAIRS OUT                       # keep the pairs whose CoTs imply the human label
"""

import argparse
import ast
import base64
import csv
import http.client
import io
import json
import math
import os
import re
import signal
import statistics
import struct
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import decord
import torch
import torch.nn.functional as F
from tqdm import tqdm

DIMENSIONS = ("subject", "dynamics", "camera", "environment", "style")
PRIMARY = ("subject", "dynamics")  # weigh twice as much as the others
MAX_TOKENS = 65_536  # judged at a time, unless told otherwise: at the 8B shape a cache of 10 GB

# <video> and <prompt> are replaced by the two things to be judged.
INSTRUCTION = """<video>The video above was generated from this prompt:
<prompt>

How well does it follow the prompt? Judge five dimensions: subject and dynamics (primary), camera, \
environment and style (secondary). Reason inside <think> </think> first: what the prompt asks for, what \
the video shows, a judgement for each dimension. Then write inside <answer> </answer> one JSON object of \
this form:
{"dimensional_scores": {"subject": 2, "dynamics": 1, "camera": "N/A", "environment": 2, "style": 0}, \
"overall_score": 3.4}
A dimension gets 2 if it is fully met, 1 if partly, 0 if missed, "N/A" if the prompt does not ask for it; \
overall_score lies between 1 and 5."""


class DataError(ValueError):
    """Bad input from outside; the message names the file (and the row) and says what is wrong with it."""


# ------------------------------------------------------------------------------------------------------------
# Videos


@dataclass(frozen=True)
class VideoSettings:
    """How a video becomes patches. The defaults are qwen-vl-utils' and Qwen3-VL's."""

    fps: float = 2.0  # frames sampled a second
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 128 * 32 * 32  # a frame
    max_pixels: int = 768 * 32 * 32  # a frame
    total_pixels: int = int(128000 * 32 * 32 * 0.9)  # a video; bounds the pixels a frame of a long one
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, field.type)) or not value > 0:
                raise TypeError(f"{field.name} is {value!r}")


def smart_nframes(total: int, video_fps: float, settings: VideoSettings) -> int:
    """How many of `total` frames to sample: an even number (qwen-vl-utils 0.0.14, `smart_nframes`). A video
    of a single frame, which qwen-vl-utils refuses, gives 2: the frame is shown twice, as Qwen3-VL shows an
    image."""
    if total < 2:
        return 2
    lowest = math.ceil(settings.min_frames / 2) * 2
    highest = math.floor(min(settings.max_frames, total) / 2) * 2
    wanted = total / video_fps * settings.fps
    return math.floor(min(max(wanted, lowest), highest, total) / 2) * 2


def smart_resize(height: int, width: int, frames: int, settings: VideoSettings) -> tuple[int, int]:
    """The size at which the model sees a frame: sides that are multiples of patch_size · merge_size, the
    number of pixels within bounds, the shape kept as nearly as possible (qwen-vl-utils 0.0.14, `fetch_video`,
    `smart_resize`)."""
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"{width} x {height} pixels: one side is more than 200 times the other")
    factor, lowest = settings.patch_size * settings.merge_size, settings.min_pixels
    share = settings.total_pixels / frames * 2  # qwen-vl-utils counts two frames as one
    highest = min(settings.max_pixels, max(share, int(lowest * 1.05)))
    h, w = (max(factor, round(side / factor) * factor) for side in (height, width))
    if h * w > highest:
        scale = math.sqrt(height * width / highest)
        h, w = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
    elif h * w < lowest:
        scale = math.sqrt(lowest / (height * width))
        h, w = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return h, w


@contextmanager
def opened(path: str | Path,
           settings: VideoSettings) -> Iterator[tuple[decord.VideoReader, list[int], list[float]]]:
    """A video file's reader, the indices of the frames to sample (an even number), and the second at which
    each stands. Raises DataError, naming the file, if it is missing or, until the end of the block, no video
    can be read from it."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        total, video_fps = len(reader), reader.get_avg_fps()
        if total < 1 or not video_fps > 0:
            raise ValueError("it has no frames")
        count = smart_nframes(total, video_fps, settings)
        indices = torch.linspace(0, total - 1, count).round().long().tolist()
        yield reader, indices, [index / video_fps for index in indices]
    except (decord.DECORDError, RuntimeError, ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise DataError(f"{path}: not a video that can be read ({reason})") from error


def read_video(path: str | Path,
               settings: VideoSettings = VideoSettings()) -> tuple[torch.Tensor, list[float]]:
    """Decode the sampled frames of a video file, at the size at which the model sees them.

    Returns frames (T, 3, H, W) uint8 with T even, and the second at which each stands in the video.
    Raises DataError, naming the file, if it is missing or no video can be read from it."""
    with opened(path, settings) as (reader, indices, seconds):
        frames = torch.from_numpy(reader.get_batch(indices).asnumpy()).permute(0, 3, 1, 2)
        size = smart_resize(*frames.shape[2:], len(indices), settings)
    if frames.shape[2:] != size:
        frames = F.interpolate(frames.float(), size, mode="bicubic", antialias=True)
        frames = frames.round().clamp(0, 255).byte()
    return frames, seconds


def patchify(frames: torch.Tensor, settings: VideoSettings) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Cut frames (T, 3, H, W) into patches (N, 3 · t · p · p), N = grid_t · grid_h · grid_w, in the order of
    Qwen3-VL: the merge_size² patches that become one token stand together. Still uint8: `DeScore` normalises
    on the device."""
    t, p, m = settings.temporal_patch_size, settings.patch_size, settings.merge_size
    total, channels, height, width = frames.shape
    grid = (total // t, height // p, width // p)
    x = frames.reshape(grid[0], t, channels, grid[1] // m, m, p, grid[2] // m, m, p)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # grid_t, h/m, w/m, m, m, channel, t, p, p
    return x.reshape(math.prod(grid), -1), grid


# ------------------------------------------------------------------------------------------------------------
# Prompts


@dataclass
class Sample:
    """A video and its prompt, ready for the model (one row of a Batch)."""

    input_ids: torch.Tensor  # (P,)
    position_ids: torch.Tensor  # (3, P): time, height, width (M-RoPE)
    patches: torch.Tensor  # (N, D) uint8
    grid: tuple[int, int, int]


@dataclass
class Batch:
    """Samples side by side, prompts padded on the right."""

    input_ids: torch.Tensor  # (B, P)
    mask: torch.Tensor  # (B, P) bool, False on padding
    position_ids: torch.Tensor  # (3, B, P)
    patches: torch.Tensor  # (ΣN, D) uint8; empty once there are features
    grid: torch.Tensor  # (B, 3)
    features: tuple | None = None  # what the vision tower made of the patches, once it has (DeScore.encode)

    def __len__(self) -> int:
        return len(self.input_ids)

    def select(self, rows: list[int]) -> "Batch":
        """Some of the samples, with no more padding than they need."""
        if rows == list(range(len(self))):
            return self
        P, grid = int(self.mask[rows].sum(1).max()), self.grid[rows]
        patches = self.grid.prod(1).tolist()

        def pick(values: torch.Tensor) -> torch.Tensor:  # of the tower's output, fewer rows than the patches
            sizes = [size * len(values) // sum(patches) for size in patches]
            return torch.cat([values.split(sizes)[row] for row in rows])

        features = self.features and (pick(self.features[0]), [pick(level) for level in self.features[1]])
        return Batch(self.input_ids[rows, :P], self.mask[rows, :P], self.position_ids[:, rows, :P],
                     pick(self.patches), grid, features)

    def to(self, device: torch.device | str) -> "Batch":
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "features"}
        features = self.features and (self.features[0].to(device), [x.to(device) for x in self.features[1]])
        return Batch(**moved, features=features)


class Processor:
    """Turns a video and its prompt into what Qwen3-VL reads: chat format, timestamps, 3-D positions.

    Text from users never becomes a special token: "<|im_end|>" in a prompt is just those characters."""

    def __init__(self, tokenizer, settings: VideoSettings = VideoSettings(),
                 instruction: str | None = INSTRUCTION):
        """instruction: a text with <video> and <prompt> in it; None where each prompt is itself a whole
        instruction, the video at its <video>, else before it."""
        if instruction is not None and instruction.count("<video>") != 1:
            raise DataError("the instruction must hold <video> exactly once, and <prompt> where the prompt "
                            "belongs")
        self.tokenizer, self.settings, self.instruction = tokenizer, settings, instruction
        names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
        self.special = {name: tokenizer.convert_tokens_to_ids(name) for name in names}
        unknown = (None, tokenizer.unk_token_id)
        if missing := [name for name, token in self.special.items() if token in unknown]:
            raise DataError(f"{tokenizer.name_or_path}: not a Qwen3-VL tokenizer, it lacks "
                            f"{', '.join(missing)}")
        self.eos_id = self.special["<|im_end|>"]
        self.known: dict[tuple[str, str], int] = {}  # key → tokens of its prompt (`lengths`)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, in which no special token is recognised."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: list[int] | torch.Tensor) -> str:
        """The text of a CoT's tokens, up to its end."""
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        return self.tokenizer.decode(ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids,
                                     skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def __call__(self, video: str | Path, prompt: str, within_turn: str | None = None) -> Sample:
        """Read a video file (`read_video`) and put it into the instruction with its prompt (`sample`)."""
        return self.sample(*read_video(video, self.settings), prompt, within_turn)

    def sample(self, frames: torch.Tensor, seconds: list[float], prompt: str,
               within_turn: str | None = None) -> Sample:
        """Frames (T, 3, H, W) uint8 and the second of each, as `read_video` returns them, with their prompt:
        the user's turn and the beginning of the assistant's. With `within_turn`, a CoT, the turn stays the
        user's and holds it, the layout in which DeScore's release scores."""
        patches, grid = patchify(frames, self.settings)
        return Sample(*self.layout(self.parts(grid, seconds, prompt, within_turn), grid), patches, grid)

    def parts(self, grid: tuple[int, int, int], seconds: list[float], prompt: str,
              within_turn: str | None = None) -> list[str | int]:
        """What a sample's sequence is made of: plain texts and ids of special tokens."""
        if self.instruction is None:
            before, after = prompt.split("<video>") if prompt.count("<video>") == 1 else ("", prompt)
        else:
            before, after = (text.replace("<prompt>", prompt) for text in self.instruction.split("<video>"))
        start, end = self.special["<|im_start|>"], self.special["<|im_end|>"]
        rest = [end, "\n", start, "assistant\n"] if within_turn is None else [within_turn]
        return [start, "user\n" + before, *self.video_parts(grid, seconds), after, *rest]

    def video_parts(self, grid: tuple[int, int, int], seconds: list[float]) -> list[str | int]:
        """The parts around each temporal patch, <0.8 seconds><|vision_start|><|video_pad|><|vision_end|>,
        with the mean time of its frames (transformers 4.57, `Qwen3VLProcessor`)."""
        t = self.settings.temporal_patch_size
        times = [(seconds[i] + seconds[i + t - 1]) / 2 for i in range(0, grid[0] * t, t)]
        marks = [self.special[name] for name in ("<|vision_start|>", "<|video_pad|>", "<|vision_end|>")]
        return [part for time in times for part in (f"<{time:.1f} seconds>", *marks)]

    def layout(self, parts: list[str | int], grid: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (P,) and positions (3, P) of parts, each plain text or the id of a special token. Text
        counts on by one in all three dimensions; the tokens of a temporal patch stand at (start, start + row,
        start + column), and what follows them goes on behind the larger side
        (`Qwen3VLModel.get_rope_index`)."""
        rows, columns = (side // self.settings.merge_size for side in grid[1:])
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        block = torch.stack([torch.zeros_like(row), row, column]).flatten(1)  # (3, rows · columns)
        pad = self.special["<|video_pad|>"]
        ids, positions, start, text = [], [], 0, ""
        for part in [*parts, None]:
            if isinstance(part, str):
                text += part  # neighbouring text is tokenised as one, as the chat template would have it
                continue
            tokens, text = self.encode(text), ""
            tokens += [part] if part not in (None, pad) else []
            ids += tokens
            positions.append((torch.arange(len(tokens)) + start).expand(3, -1))
            start += len(tokens)
            if part == pad:
                ids += [pad] * (rows * columns)
                positions.append(block + start)
                start += max(rows, columns)
        return torch.tensor(ids), torch.cat(positions, dim=1)

    def collate(self, samples: list[Sample]) -> Batch:
        """Put samples side by side."""
        pad = torch.nn.utils.rnn.pad_sequence
        return Batch(
            input_ids=pad([s.input_ids for s in samples], batch_first=True, padding_value=self.eos_id),
            mask=pad([torch.ones_like(s.input_ids, dtype=torch.bool) for s in samples], batch_first=True),
            position_ids=pad([s.position_ids.T for s in samples], batch_first=True).permute(2, 0, 1),
            patches=torch.cat([s.patches for s in samples]),
            grid=torch.tensor([s.grid for s in samples]),
        )

    def outline(self, video: str | Path, prompt: str, within_turn: str | None = None) -> Sample:
        """The sample of a video file without any patches: a single frame is decoded."""
        s = self.settings
        with opened(video, s) as (reader, indices, seconds):
            height, width = smart_resize(*reader[0].shape[:2], len(indices), s)
        grid = (len(indices) // s.temporal_patch_size, height // s.patch_size, width // s.patch_size)
        ids, positions = self.layout(self.parts(grid, seconds, prompt, within_turn), grid)
        patches = torch.empty(0, 3 * s.temporal_patch_size * s.patch_size**2, dtype=torch.uint8)
        return Sample(ids, positions, patches, grid)

    def lengths(self, keys: list[tuple[str, str]]) -> list[int]:
        """How many tokens the prompt of each (video, prompt) key has (`outline`). 0 where a video cannot be
        read: reading it will say why."""

        def length(key: tuple[str, str]) -> int:
            try:
                return len(self.outline(*key).input_ids)
            except DataError:
                return 0

        new = list(dict.fromkeys(key for key in keys if key not in self.known))
        with ThreadPoolExecutor() as pool:
            found = pool.map(length, new)
            self.known |= zip(new, tqdm(found, "lengths", len(new), unit="video", disable=len(new) < 2000))
        return [self.known[key] for key in keys]

    def batches(self, groups: list[list[list[tuple[str, str]]]], workers: int = 0, limit: int | None = None
                ) -> Iterator[tuple[Batch | None, list[int], list[dict]]]:
        """One Batch for each group, in order. With workers, other processes decode ahead.

        A group is a list of units, such as pairs, and a unit a list of (video, prompt) keys that stand or
        fall together: if a video cannot be read, or makes a prompt of more than `limit` tokens, its unit is
        left out. Yields the batch (None if nothing is left), which units are in it, and for each that is not
        its keys and what was wrong."""

        class Groups(torch.utils.data.Dataset):
            def __len__(_):
                return len(groups)

            def __getitem__(_, index):
                samples, kept, bad = [], [], []
                for i, unit in enumerate(groups[index]):
                    try:
                        read = [self(video, prompt) for video, prompt in unit]
                        for sample, (video, _) in zip(read, unit):
                            if limit and len(sample.input_ids) > limit:
                                raise DataError(f"{video}: a prompt of {len(sample.input_ids)} tokens, "
                                                f"more than {limit}")
                        samples += read
                        kept.append(i)
                    except DataError as error:
                        bad.append({"videos": [video for video, _ in unit], "error": str(error)})
                return self.collate(samples) if samples else None, kept, bad

        return iter(torch.utils.data.DataLoader(Groups(), batch_size=None, num_workers=workers,
                                                worker_init_fn=leave_signals))


def packed(items: list, sizes: list[int], budget: int) -> list[list]:
    """Items of like size together: lists in which the largest size times the number of items is within the
    budget. The largest items come first, so that what does not fit in memory shows at once; one above the
    budget stands alone."""
    lists, widest = [], 0
    for row in sorted(range(len(items)), key=lambda row: -sizes[row]):
        if not lists or widest * (len(lists[-1]) + 1) > budget:
            lists.append([])
            widest = sizes[row]
        lists[-1].append(items[row])
    return lists


def alike(lengths: list[int], waste: float = 0.1) -> list[list[int]]:
    """Row numbers in lists of like length: side by side, at most a share `waste` of each list is padding."""
    lists, used = [], 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not lists or used + lengths[row] < (1 - waste) * (len(lists[-1]) + 1) * lengths[lists[-1][0]]:
            lists.append([])
            used = 0
        lists[-1].append(row)
        used += lengths[row]
    return lists


def leave_signals(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; what it means is decided by the one that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ------------------------------------------------------------------------------------------------------------
# Chains of thought

LAYOUT = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
TAG = re.compile(r"</?(?:think|answer)>")


def parse_cot(text: str) -> dict | None:
    """The scores a CoT ends with: {"dimensional_scores": {...}, "overall_score": float | None}.

    None unless the text holds exactly one <answer> block and this holds one JSON object (in a ```json fence
    or not) with a valid sub-score for each of the five dimensions and no other, and an overall_score in [1,
    5] if any."""
    _, opening, rest = text.partition("<answer>")
    answer, closing, after = rest.partition("</answer>")
    if not opening or not closing or "<answer>" in answer + after:
        return None
    answer = answer.strip()
    if answer.startswith("```") and answer.endswith("```") and len(answer) >= 6:
        answer = answer[3:-3].removeprefix("json")
    try:
        answer = json.loads(answer, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError):
        return None
    scores = answer.get("dimensional_scores") if isinstance(answer, dict) else None
    if not is_scores(scores):
        return None
    overall = answer.get("overall_score")
    if "overall_score" in answer and not (is_number(overall) and 1 <= overall <= 5):
        return None
    return {"dimensional_scores": scores, "overall_score": None if overall is None else float(overall)}


def no_duplicates(items: list[tuple[str, object]]) -> dict:
    """A JSON object that says each thing once; ValueError for one that says something twice."""
    if len(dict(items)) < len(items):
        raise ValueError("a key stands twice")
    return dict(items)


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_scores(scores) -> bool:
    """Whether this is a sub-score, 0, 1, 2 or "N/A", for each of the five dimensions and nothing else."""
    return (isinstance(scores, dict) and set(scores) == set(DIMENSIONS)
            and all(value == "N/A" if isinstance(value, str) else is_number(value) and value in (0, 1, 2)
                    for value in scores.values()))


def follows_format(text: str) -> bool:
    """Whether a CoT keeps the format exactly: one <think> block with something in it, then one <answer> block
    that `parse_cot` accepts, nothing but white space around them and no further tag in them."""
    match = LAYOUT.fullmatch(text) if len(TAG.findall(text)) == 4 else None
    return bool(match and match[1].strip() and parse_cot(text))


def agreement(scores: dict, reference: dict) -> float:
    """Share of the reference sub-scores that are matched exactly, "N/A" included; in [0, 1]."""
    return sum(scores.get(dimension) == value for dimension, value in reference.items()) / len(reference)


def overall_score(scores: dict) -> float | None:
    """An overall score in [1, 5] from sub-scores: their mean, primary dimensions twice as heavy, "N/A" left
    out, so that 0 maps to 1 and 2 to 5. None where every dimension is "N/A"."""
    weighed = [(2 if name in PRIMARY else 1, value) for name, value in scores.items() if value != "N/A"]
    return 1 + 2 * sum(w * value for w, value in weighed) / sum(w for w, _ in weighed) if weighed else None


def implied_overall(text: str) -> float | None:
    """What a CoT says of its video on a scale of 1 to 5: its overall_score, else its weighted sub-scores."""
    cot = parse_cot(text)
    if cot is None:
        return None
    return overall_score(cot["dimensional_scores"]) if cot["overall_score"] is None else cot["overall_score"]


# ------------------------------------------------------------------------------------------------------------
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
    problem: str | None = None  # the whole instruction, where a file of DeScore's release brings its own

    @property
    def human(self) -> int:
        """+1 (A is better), -1 (B is better), 0 (tie)."""
        return {"A": 1, "B": -1, "tie": 0}[self.preference]

    def videos(self) -> list[tuple[str, str]]:
        """The two (video, prompt) keys by which a video's judgement is known."""
        return [(self.video_a, self.prompt), (self.video_b, self.prompt)]


class Pairs(list):
    """The pairs of a file, and which of its rows were left out and why."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.left_out = path, []  # [{"row": 3, "reason": "missing", "detail": "…"}]

    def summary(self) -> str:
        """How many pairs there are and how many rows were left out, with the first few by name."""
        text = f"{self.path}: {len(self)} pairs"
        for reason, count in Counter(row["reason"] for row in self.left_out).items():
            named = [f"row {row['row']}{row['detail'] and ' ' + row['detail']}" for row in self.left_out
                     if row["reason"] == reason]
            text += f"; {count} left out, {reason}: " + ", ".join(named[:5]) + (", …" if count > 5 else "")
        return text


class Skipped:
    """The pairs that training leaves out because a video cannot be read: listed in a file, and bounded."""

    def __init__(self, path: Path, pairs: Pairs, limit: float, write: bool = True):
        """limit: the largest share of the file's pairs that may be left out, those with missing videos
        included."""
        self.path, self.write, self.records, self.limit = path, write, [], limit
        missing = [row for row in pairs.left_out if row["reason"] == "missing"]
        self.total = len(pairs) + len(missing)
        if write:
            path.write_text("")
        self.add([{"row": row["row"], "videos": [row["detail"]], "error": "missing"} for row in missing])

    def add(self, bad: list[dict]) -> None:
        """List some more. Raises DataError past the limit."""
        if self.write:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in bad)
        self.records += bad
        if len(self.records) > self.limit * self.total:
            raise DataError(f"{len(self.records)} of {self.total} pairs have videos that cannot be read, "
                            f"more than --max-skipped {self.limit:g} allows; they are listed in {self.path}. "
                            f"The last: {self.records[-1]['error']}")

    def restore(self, records: list[dict]) -> None:
        """List these and no others, as a checkpoint has them."""
        self.records = []
        if self.write:
            self.path.write_text("")
        self.add(records)


SIDES = {"A": "A", "B": "B", "same": "tie", "tie": "tie", "invalid": None}
VOTES = {"leftvote": "A", "rightvote": "B", "tievote": "tie", "bothbad_vote": "tie"}
LABELS = ("TA", "Overall")  # text alignment is what this method judges


def read_pairs(path: str | Path, label: str | None = None, root: str | Path | None = None) -> Pairs:
    """Read a pair file: our own JSON lines (README, "Pair files") or one of the CSV formats that video reward
    models use, told apart by their columns: VideoAlign and VideoGen-RewardBench, GenAI-Bench, DeScore's stage
    1, stage 2 and evaluation. `label` names the column of the preference where there are several; by default
    TA, else Overall. Paths are relative to `root`, by default the file's own folder.

    Rows marked invalid and rows whose videos are missing are left out and listed. Raises DataError, naming
    the file and the row, for anything that cannot be understood, a label outside the format's set
    included."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    pairs = Pairs(path)
    csv.field_size_limit(2**24)
    try:
        is_json = text.lstrip().startswith(("{", "["))
        columns = [] if is_json else next(csv.reader(io.StringIO(text)), [])
        rows = csv_records(text, columns, path, label) if len(columns) > 1 else json_records(text, path)
        rows = list(rows)
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV file that can be read ({error})") from error
    for row, record in rows:
        if record["preference"] is None:
            pairs.left_out.append({"row": row, "reason": "invalid", "detail": ""})
            continue
        pair = make_pair(record, path, row, Path(root or path.parent))
        missing = [video for video in (pair.video_a, pair.video_b) if not os.path.isfile(video)]
        if missing:
            pairs.left_out.append({"row": row, "reason": "missing", "detail": missing[0]})
        else:
            pairs.append(pair)
    if not pairs:
        raise DataError(f"{pairs.summary()}: nothing to work on")
    return pairs


def json_records(text: str, path: Path) -> Iterator[tuple[int, dict]]:
    """The rows of our own format, one JSON object a line."""
    for row, line in enumerate(text.split("\n"), 1):  # not at what else Unicode calls the end of a line
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, row {row}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, row {row}: not a JSON object")
        for key in ("prompt", "video_a", "video_b", "preference"):
            if not isinstance(record.get(key), str) or not record[key].strip():
                raise DataError(f"{path}, row {row}: {key!r} is missing or not a text")
        yield row, record


def csv_records(text: str, columns: list[str], path: Path, label: str | None) -> Iterator[tuple[int, dict]]:
    """The rows of a CSV file in the terms of our own format; preference None stands for a row marked
    invalid."""

    def pick(labels: dict, value: str, row: int):
        value = value.strip()
        if value not in labels:
            raise DataError(f"{path}, row {row}: the label is {value!r}, not one of {', '.join(labels)}")
        return labels[value]

    def two_videos(row: int, value: str) -> tuple[str, str]:
        try:
            videos = ast.literal_eval(value)
            a, b = videos
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            a = None
        if not isinstance(a, str) or not isinstance(b, str):
            raise DataError(f"{path}, row {row}: videos is not a list of two paths: {value[:80]!r}")
        return a, b

    has = set(columns).issuperset
    if has({"path_A", "path_B", "prompt"}):
        column = label or next((name for name in LABELS if name in columns), None)
        if column not in columns:
            raise DataError(f"{path}: no label column {column or ' or '.join(LABELS)}; it has "
                            f"{', '.join(columns)}")

        def convert(row, r):
            return {"video_a": r["path_A"], "video_b": r["path_B"], "preference": pick(SIDES, r[column], row),
                    "model_a": r.get("A_model"), "model_b": r.get("B_model")}
    elif has({"left_model", "right_model", "vote_type", "prompt"}):
        left, right = (next((name for name in names if name in columns), None)
                       for names in (("left_video_path", "left_video"), ("right_video_path", "right_video")))
        if not left or not right:
            raise DataError(f"{path}: a GenAI-Bench file without left_video(_path) and right_video(_path)")

        def convert(row, r):
            return {"video_a": r[left], "video_b": r[right], "preference": pick(VOTES, r["vote_type"], row),
                    "model_a": r["left_model"], "model_b": r["right_model"]}
    elif has({"videos", "GSB"}):

        def convert(row, r):
            a, b = two_videos(row, r["videos"])
            return {"video_a": a, "video_b": b, "preference": pick(SIDES, r["GSB"], row),
                    "cot_a": r.get("CoT_A") or None, "cot_b": r.get("CoT_B") or None}
    elif has({"videos", "answer"}) or has({"video_A", "video_B", "answer"}):

        def convert(row, r):
            a, b = two_videos(row, r["videos"]) if "videos" in columns else (r["video_A"], r["video_B"])
            return {"video_a": a, "video_b": b} | release_answer(r["answer"], path, row)
    else:
        raise DataError(f"{path}: none of the pair formats has these columns: {', '.join(columns)[:300]}")
    for row, r in enumerate(csv.DictReader(io.StringIO(text)), 1):
        if None in r.values() or None in r:
            raise DataError(f"{path}, row {row}: not {len(columns)} columns")
        record = convert(row, r)
        yield row, record | {"prompt": r.get("prompt") or r.get("problem"), "problem": r.get("problem")}


def release_answer(text: str, path: Path, row: int) -> dict:
    """The label, and where it has them the sub-scores, of an `answer` in DeScore's release."""
    if text.strip() in SIDES:
        return {"preference": SIDES[text.strip()]}
    try:
        block = text.partition("<answer>")[2].partition("</answer>")[0]
        answer = json.loads(block if "<answer>" in text else text)
        result = str(answer["gsb_result"]).strip()
    except (ValueError, IndexError, KeyError, TypeError, RecursionError) as error:
        result = text.strip()
        if not result.startswith("Video"):
            raise DataError(f"{path}, row {row}: the answer has no gsb_result: {text[:80]!r}") from error
        answer = {}
    sides = {"Video 1 is better": "A", "Video 2 is better": "B"} | SIDES
    found = {"preference": sides.get(result, "tie")}
    for key, name in (("scores_a", "video_1_scores"), ("scores_b", "video_2_scores")):
        if name in answer:
            scores = answer[name]
            if isinstance(scores, dict) and "object" in scores:  # the paper's word for it
                scores = {"subject" if dimension == "object" else dimension: v
                          for dimension, v in scores.items()}
            found[key] = scores
    return found


def make_pair(record: dict, path: Path, row: int, root: Path) -> Pair:
    """Check one record and resolve its paths."""
    for key in ("prompt", "video_a", "video_b"):
        if not isinstance(record[key], str) or not record[key].strip():
            raise DataError(f"{path}, row {row}: the {key} is empty")
    if record["preference"] not in ("A", "B", "tie"):
        raise DataError(f"{path}, row {row}: preference is {record['preference']!r}, not 'A', 'B' or 'tie'")
    for key in ("scores_a", "scores_b"):
        if record.get(key) is not None and not is_scores(record[key]):
            raise DataError(f"{path}, row {row}: {key} is not 0, 1, 2 or \"N/A\" for each of "
                            f"{', '.join(DIMENSIONS)}")
    for key in ("cot_a", "cot_b", "model_a", "model_b", "problem"):
        if not isinstance(record.get(key), (str, type(None))):
            raise DataError(f"{path}, row {row}: {key} is not a text")
    known = {field.name: record.get(field.name) for field in fields(Pair)}
    return Pair(**known | {key: str(root / record[key]) for key in ("video_a", "video_b")})


def write_pairs(path: str | Path, pairs: list[Pair]) -> None:
    """Write our own format, with paths relative to the file; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for pair in pairs:
        record = {key: value for key, value in asdict(pair).items() if value is not None}
        for key in ("video_a", "video_b"):
            record[key] = os.path.relpath(record[key], path.parent)
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    beside = path.with_name(path.name + ".partial")
    beside.write_text("".join(lines), encoding="utf-8")
    beside.replace(path)


# ------------------------------------------------------------------------------------------------------------
# Annotation and the consistency filter


def annotate(pairs_file: Path, out: Path, write: Callable[[list[tuple[str, str]], dict], Iterator[dict]],
             scores: bool = False) -> None:
    """Write a CoT for every video of a pair file, each (video, prompt) once; with `scores` also the
    sub-scores that can be read from it, as reference (pairs of which they can't be are left out and counted).

    `write(keys, done)` yields a record with video, prompt and cot for each key that is not done. They are
    appended to OUT.cots as they come; a run that was cut off goes on behind them and ends with the same
    file."""
    pairs = read_pairs(pairs_file)
    keys = list(dict.fromkeys(key for pair in pairs for key in pair.videos()))
    written = out.with_name(out.name + ".cots")
    lines = written.read_text(encoding="utf-8").splitlines(keepends=True) if written.is_file() else []
    lines = [line for line in lines if line.endswith("\n")]
    cots = {(record["video"], record["prompt"]): record["cot"] for record in map(json.loads, lines)}
    if not cots.keys() <= set(keys):
        raise DataError(f"{written}: holds CoTs of other videos; remove it or choose another OUT")
    out.parent.mkdir(parents=True, exist_ok=True)
    written.write_text("".join(lines), encoding="utf-8")
    if lines:
        print(f"{written}: going on after {len(lines)} of {len(keys)} videos")
    with written.open("a", encoding="utf-8") as file:
        new = write(keys, dict(cots))
        for record in tqdm(new, "annotate", total=len(keys), initial=len(lines), unit="video"):
            record = {name: record[name] for name in ("video", "prompt", "cot")}
            cots[record["video"], record["prompt"]] = record["cot"]
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
    for pair in pairs:
        pair.cot_a, pair.cot_b = (cots[key] for key in pair.videos())
        if scores:
            parsed = parse_cot(pair.cot_a), parse_cot(pair.cot_b)
            pair.scores_a, pair.scores_b = (cot and cot["dimensional_scores"] for cot in parsed)
    kept = [pair for pair in pairs if not scores or (pair.scores_a and pair.scores_b)]
    write_pairs(out, kept)
    print(f"{out}: {len(kept)} pairs, {len(keys)} videos annotated"
          + (f"; {len(pairs) - len(kept)} left out, no scores can be read from a CoT"
             if len(kept) < len(pairs) else ""))
    written.unlink()


class Api:
    """Asks an OpenAI-compatible chat endpoint for CoTs, showing it the sampled frames as images.

    A request that times out, is refused for load (HTTP 408, 409, 429, 5xx) or is answered with nonsense is
    sent again after 1, 2, 4, … seconds, or when the server says; any other refusal, and the last failure,
    stop with DataError."""

    def __init__(self, url: str, model: str, settings: VideoSettings, key: str | None = None,
                 max_new_tokens: int = 4096, temperature: float = 1.0, parallel: int = 8,
                 timeout: float = 120.0, retries: int = 6, first_wait: float = 1.0):
        self.url = url.rstrip("/") + "/chat/completions"
        self.model, self.settings, self.key = model, settings, key
        self.max_new_tokens, self.temperature, self.parallel = max_new_tokens, temperature, parallel
        self.timeout, self.retries, self.first_wait = timeout, retries, first_wait

    def __call__(self, keys: list[tuple[str, str]], done: dict) -> Iterator[dict]:
        """Records with video, prompt and cot of the keys that are not done, in order; at most `parallel`
        requests are under way."""
        with ThreadPoolExecutor(self.parallel) as pool:
            waiting: deque[Future] = deque()
            try:
                for key in keys:
                    if key in done:
                        continue
                    waiting.append(pool.submit(self.ask, *key))
                    if len(waiting) >= 2 * self.parallel:  # finished ones may wait for a slow one before them
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def ask(self, video: str, prompt: str) -> dict:
        frames, seconds = read_video(video, self.settings)
        before, after = (text.replace("<prompt>", prompt) for text in INSTRUCTION.split("<video>"))
        content = [{"type": "text", "text": before}] if before else []
        for frame, second in zip(frames, seconds):
            content += [{"type": "text", "text": f"<{second:.1f} seconds>"},
                        {"type": "image_url", "image_url": {
                            "url": "data:image/png;base64," + base64.b64encode(png(frame)).decode()}}]
        body = {"model": self.model, "max_tokens": self.max_new_tokens, "temperature": self.temperature,
                "messages": [{"role": "user", "content": [*content, {"type": "text", "text": after}]}]}
        authorization = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        headers = {"Content-Type": "application/json"} | authorization
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        wait, problem = self.first_wait, ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(wait)
                wait = min(2 * wait, 60)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    text = json.load(answer)["choices"][0]["message"]["content"]
                if isinstance(text, str) and text.strip():
                    return {"video": video, "prompt": prompt, "cot": text}
                problem = "an empty answer"
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {error.reason}"
                if error.code not in (408, 409, 429) and error.code < 500:
                    detail = error.read(300).decode(errors="replace")
                    raise DataError(f"{self.url}: {problem} for {video}: {detail}") from error
                if (error.headers.get("Retry-After") or "").isdigit():
                    wait = max(wait, min(int(error.headers["Retry-After"]), 300))
            except (OSError, http.client.HTTPException) as error:  # no connection, time-out, cut off
                problem = str(error) or type(error).__name__
            except (ValueError, LookupError, TypeError):
                problem = "an answer that is no chat completion"
        raise DataError(f"{self.url}: gave up on {video} after {self.retries + 1} attempts: {problem}")


def png(frame: torch.Tensor) -> bytes:
    """A frame (3, H, W) uint8 as a PNG file."""
    _, height, width = frame.shape
    # Each row begins with its filter, 0: none.
    rows = F.pad(frame.permute(1, 2, 0).reshape(height, width * 3), (1, 0))

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(rows.numpy().tobytes(), 6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def consistent(pair: Pair) -> str:
    """Whether the preference that a pair's two CoTs imply is the human label: "kept", or why not."""
    if pair.cot_a is None or pair.cot_b is None:
        return "no CoT"
    overall_a, overall_b = implied_overall(pair.cot_a), implied_overall(pair.cot_b)
    if overall_a is None or overall_b is None:
        return "a CoT that cannot be parsed"
    implied = (overall_a > overall_b) - (overall_a < overall_b)
    if implied == pair.human:
        return "kept"
    if implied == 0:
        return "the CoTs imply a tie"
    return "the label is a tie" if pair.human == 0 else "the CoTs imply the other"


def check(pairs_file: Path, settings: VideoSettings, label: str | None, root: Path | None,
          tokenizer: str) -> bool:
    """Read a pair file whole, read each video with its prompt as a model would, print a summary. False if any
    is broken or missing. `tokenizer`: directory or hub id of the one that counts tokens."""
    from transformers import AutoTokenizer  # slow to import, and nothing else here needs it

    processor = Processor(AutoTokenizer.from_pretrained(tokenizer), settings)
    pairs = read_pairs(pairs_file, label, root)
    print(pairs.summary())
    labels = Counter(pair.preference for pair in pairs).most_common()
    print("labels: " + ", ".join(f"{count} {name}" for name, count in labels))
    broken, tokens, video_tokens, seconds, sizes = [], [], [], [], Counter()
    prompts = dict(key for pair in pairs for key in pair.videos())  # video → one of its prompts
    for video, prompt in tqdm(sorted(prompts.items()), "check", unit="video"):
        try:
            frames, times = read_video(video, settings)
        except DataError as error:
            broken.append(str(error))
            continue
        sample = processor.sample(frames, times, prompt)
        tokens.append(len(sample.input_ids))
        video_tokens.append(math.prod(sample.grid) // settings.merge_size**2)
        seconds.append(times[-1])
        sizes[f"{frames.shape[3]}x{frames.shape[2]}"] += 1
    for name, values in (("tokens a sample", tokens), ("video tokens a sample", video_tokens),
                         ("seconds a video", seconds)):
        if values:
            print(f"{name}: {min(values):.0f} to {max(values):.0f}, median {statistics.median(values):.0f}")
    print("sizes at the model: " + ", ".join(f"{count} of {size}" for size, count in sizes.most_common(8)))
    print("\n".join([f"videos: {len(tokens)} read, {len(broken)} broken", *broken]))
    return not broken and not any(row["reason"] == "missing" for row in pairs.left_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, help: str, out: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("pairs", type=Path, help="a pair file of any known format")
        if out:
            sub.add_argument("out", type=Path, help="a file in our own format, JSON lines")
        return sub

    def add_format(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--label", help="the preference's column, if there are several [TA, else Overall]")
        sub.add_argument("--root", type=Path, help="folder that the file's paths are relative to [its own]")

    def add_video(sub: argparse.ArgumentParser, max_pixels: int) -> None:
        sub.add_argument("--fps", type=float, default=2.0, help="frames sampled a second")
        sub.add_argument("--min-pixels", type=int, default=VideoSettings.min_pixels,
                         help="pixels a frame, at least")
        sub.add_argument("--max-pixels", type=int, default=max_pixels, help="pixels a frame, at most")

    sub = add("annotate", "let a model write a CoT for every video of a pair file")
    sub.add_argument("--model", help="a Qwen3-VL or a saved DeScore, directory or hub id")
    sub.add_argument("--api", metavar="URL", help="an OpenAI-compatible endpoint instead, up to /v1")
    sub.add_argument("--api-model", help="the model's name there")
    sub.add_argument("--api-key-env", default="OPENAI_API_KEY",
                     help="environment variable that holds the key, if any")
    sub.add_argument("--parallel", type=int, default=8, help="requests under way at a time")
    sub.add_argument("--timeout", type=float, default=120.0, help="seconds a request may take")
    sub.add_argument("--retries", type=int, default=6, help="attempts after the first")
    sub.add_argument("--scores", action="store_true", help="keep the sub-scores as reference, for stage 2")
    sub.add_argument("--max-new-tokens", type=int, default=4096, help="longest CoT")
    sub.add_argument("--temperature", type=float, default=1.0)
    sub.add_argument("--max-tokens", type=int, default=MAX_TOKENS,
                     help="tokens at a time, of prompts and CoTs")
    sub.add_argument("--seed", type=int, default=0)
    add_video(sub, 307_200)
    add("filter", "keep the pairs whose two CoTs imply the human label")
    add_format(add("convert", "write any pair file in our own format"))
    sub = add("check", "read a pair file whole, open every video, print a summary; exit code 1 if any is "
              "broken", out=False)
    add_format(sub)
    add_video(sub, 448 * 448)
    sub.add_argument("--model", default=str(Path(__file__).parent / "toy/backbone"),
                     help="whose tokenizer counts the tokens, directory or hub id [the embedded one]")
    args = parser.parse_args()
    try:
        if args.command == "check":
            settings = VideoSettings(fps=args.fps, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
            raise SystemExit(0 if check(args.pairs, settings, args.label, args.root, args.model) else 1)
        if args.command == "convert":
            pairs = read_pairs(args.pairs, args.label, args.root)
            write_pairs(args.out, pairs)
            print(f"{args.out}: from {pairs.summary()}")
        elif args.command == "filter":
            pairs = read_pairs(args.pairs)
            verdicts = [consistent(pair) for pair in pairs]
            write_pairs(args.out, [pair for pair, verdict in zip(pairs, verdicts) if verdict == "kept"])
            counts = Counter(verdicts).most_common()
            print(f"{args.out}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts))
        else:
            if bool(args.model) == bool(args.api) or bool(args.api) != bool(args.api_model):
                raise DataError("annotate needs --model, or --api and --api-model")
            if args.api:
                settings = VideoSettings(fps=args.fps, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
                write = Api(args.api, args.api_model, settings, os.environ.get(args.api_key_env),
                            args.max_new_tokens, args.temperature, args.parallel, args.timeout, args.retries)
                annotate(args.pairs, args.out, write, args.scores)
            else:
                # The one place where data.py needs the model, and only as a command.
                from model import DeScore

                model = DeScore.load(args.model)

                def write(keys, done):
                    return model.judge(keys, args.max_new_tokens, args.temperature, args.seed,
                                       args.max_tokens, done)

                annotate(args.pairs, args.out, write, args.scores)
    except DataError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
