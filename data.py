"""From files to tensors: videos, prompts, chains of thought, preference pairs.

Everything a Qwen3-VL reads is made here, token for token and pixel for pixel as its own pipeline makes it (qwen-vl-utils
0.0.14 and the processor of transformers 4.57), with no torchvision. Also a small command line:

    python data.py annotate PAIRS OUT --model BACKBONE    # let a backbone write a CoT for every video
    python data.py filter IN OUT                          # keep the pairs whose CoTs imply the human label
"""

import argparse
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import decord
import torch
import torch.nn.functional as F

DIMENSIONS = ("subject", "dynamics", "camera", "environment", "style")
PRIMARY = ("subject", "dynamics")  # weigh twice as much as the others

# <video> and <prompt> are replaced by the two things to be judged.
INSTRUCTION = """<video>The video above was generated from this prompt:
<prompt>

How well does it follow the prompt? Judge five dimensions: subject and dynamics (primary), camera, environment and \
style (secondary). Reason inside <think> </think> first: what the prompt asks for, what the video shows, a judgement \
for each dimension. Then write inside <answer> </answer> one JSON object of this form:
{"dimensional_scores": {"subject": 2, "dynamics": 1, "camera": "N/A", "environment": 2, "style": 0}, \
"overall_score": 3.4}
A dimension gets 2 if it is fully met, 1 if partly, 0 if missed, "N/A" if the prompt does not ask for it; \
overall_score lies between 1 and 5."""


class DataError(ValueError):
    """Bad input from outside; the message names the file (and the row) and says what is wrong with it."""


# ---------------------------------------------------------------------------------------------------------------------
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


def smart_nframes(total: int, video_fps: float, settings: VideoSettings) -> int:
    """How many of `total` frames to sample: an even number (qwen-vl-utils 0.0.14, `smart_nframes`). A video of a
    single frame, which qwen-vl-utils refuses, gives 2: the frame is shown twice, as Qwen3-VL shows an image."""
    if total < 2:
        return 2
    lowest = math.ceil(settings.min_frames / 2) * 2
    highest = math.floor(min(settings.max_frames, total) / 2) * 2
    wanted = total / video_fps * settings.fps
    return math.floor(min(max(wanted, lowest), highest, total) / 2) * 2


def smart_resize(height: int, width: int, frames: int, settings: VideoSettings) -> tuple[int, int]:
    """The size at which the model sees a frame: sides that are multiples of patch_size · merge_size, the number of
    pixels within bounds, the shape kept as nearly as possible (qwen-vl-utils 0.0.14, `fetch_video`, `smart_resize`)."""
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


def read_video(path: str | Path, settings: VideoSettings = VideoSettings()) -> tuple[torch.Tensor, list[float]]:
    """Decode the sampled frames of a video file, at the size at which the model sees them.

    Returns frames (T, 3, H, W) uint8 with T even, and the second at which each stands in the video.
    Raises DataError, naming the file, if it is missing or no video can be read from it."""
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
        frames = torch.from_numpy(reader.get_batch(indices).asnumpy()).permute(0, 3, 1, 2)
        size = smart_resize(*frames.shape[2:], count, settings)
    except (decord.DECORDError, RuntimeError, ValueError, IndexError) as error:
        raise DataError(f"{path}: not a video that can be read ({str(error).strip().splitlines()[0][:200]})") from error
    if frames.shape[2:] != size:
        frames = F.interpolate(frames.float(), size, mode="bicubic", antialias=True).round().clamp(0, 255).byte()
    return frames, [index / video_fps for index in indices]


def patchify(frames: torch.Tensor, settings: VideoSettings) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Cut frames (T, 3, H, W) into patches (N, 3 · t · p · p), N = grid_t · grid_h · grid_w, in the order of Qwen3-VL:
    the merge_size² patches that become one token stand together. Still uint8: `DeScore` normalises on the device."""
    t, p, m = settings.temporal_patch_size, settings.patch_size, settings.merge_size
    total, channels, height, width = frames.shape
    grid = (total // t, height // p, width // p)
    x = frames.reshape(grid[0], t, channels, grid[1] // m, m, p, grid[2] // m, m, p)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # grid_t, h/m, w/m, m, m, channel, t, p, p
    return x.reshape(math.prod(grid), -1), grid


# ---------------------------------------------------------------------------------------------------------------------
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
    patches: torch.Tensor  # (ΣN, D) uint8
    grid: torch.Tensor  # (B, 3)
    features: tuple | None = None  # what the vision tower made of the patches, once it has (DeScore.encode)

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device | str) -> "Batch":
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "features"}
        return Batch(**moved, features=self.features)


class Processor:
    """Turns a video and its prompt into what Qwen3-VL reads: its chat format, its timestamps, its 3-D positions.

    Text from users never becomes a special token: a prompt that holds "<|im_end|>" is just those characters."""

    def __init__(self, tokenizer, settings: VideoSettings = VideoSettings(), instruction: str = INSTRUCTION):
        if instruction.count("<video>") != 1:
            raise DataError("the instruction must hold <video> exactly once, and <prompt> where the prompt belongs")
        self.tokenizer, self.settings, self.instruction = tokenizer, settings, instruction
        names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
        self.special = {name: tokenizer.convert_tokens_to_ids(name) for name in names}
        if missing := [name for name, token in self.special.items() if token in (None, tokenizer.unk_token_id)]:
            raise DataError(f"{tokenizer.name_or_path}: not a Qwen3-VL tokenizer, it lacks {', '.join(missing)}")
        self.eos_id = self.special["<|im_end|>"]

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, in which no special token is recognised."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: list[int] | torch.Tensor) -> str:
        """The text of a CoT's tokens, up to its end."""
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        return self.tokenizer.decode(ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids,
                                     skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def __call__(self, video: str | Path, prompt: str) -> Sample:
        """Read a video file (see `read_video`) and put it into the instruction with its prompt."""
        return self.sample(*read_video(video, self.settings), prompt)

    def sample(self, frames: torch.Tensor, seconds: list[float], prompt: str) -> Sample:
        """Frames (T, 3, H, W) uint8 and the second of each, as `read_video` returns them, with their prompt."""
        patches, grid = patchify(frames, self.settings)
        before, after = (text.replace("<prompt>", prompt) for text in self.instruction.split("<video>"))
        start, end = self.special["<|im_start|>"], self.special["<|im_end|>"]
        parts = [start, "user\n" + before, *self.video_parts(grid, seconds), after, end, "\n", start, "assistant\n"]
        return Sample(*self.layout(parts, grid), patches, grid)

    def video_parts(self, grid: tuple[int, int, int], seconds: list[float]) -> list[str | int]:
        """The parts around each temporal patch, <0.8 seconds><|vision_start|><|video_pad|><|vision_end|>, with the mean
        time of its frames (transformers 4.57, `Qwen3VLProcessor`)."""
        t = self.settings.temporal_patch_size
        times = [(seconds[i] + seconds[i + t - 1]) / 2 for i in range(0, grid[0] * t, t)]
        marks = [self.special[name] for name in ("<|vision_start|>", "<|video_pad|>", "<|vision_end|>")]
        return [part for time in times for part in (f"<{time:.1f} seconds>", *marks)]

    def layout(self, parts: list[str | int], grid: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (P,) and positions (3, P) of parts, each plain text or the id of a special token. Text counts on by
        one in all three dimensions; the tokens of a temporal patch stand at (start, start + row, start + column), and
        what follows them goes on behind the larger side (`Qwen3VLModel.get_rope_index`)."""
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

    def batches(self, groups: list[list[tuple[str, str]]], workers: int = 0) -> Iterator[Batch]:
        """One Batch for each group of (video, prompt) keys, in order. With workers, other processes decode ahead."""

        class Groups(torch.utils.data.Dataset):
            def __len__(_):
                return len(groups)

            def __getitem__(_, index):
                return self.collate([self(video, prompt) for video, prompt in groups[index]])

        return iter(torch.utils.data.DataLoader(Groups(), batch_size=None, num_workers=workers))


# ---------------------------------------------------------------------------------------------------------------------
# Chains of thought

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
FENCE = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)
LAYOUT = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
TAG = re.compile(r"</?(?:think|answer)>")


def parse_cot(text: str) -> dict | None:
    """The scores a CoT ends with: {"dimensional_scores": {...}, "overall_score": float | None}.

    None unless the text holds exactly one <answer> block and this holds one JSON object (in a ```json fence or not)
    with a valid sub-score for each of the five dimensions and no other, and an overall_score in [1, 5] if any."""
    answers = ANSWER.findall(text)
    if len(answers) != 1:
        return None
    fenced = FENCE.fullmatch(answers[0])
    try:
        answer = json.loads(fenced[1] if fenced else answers[0])
    except (ValueError, RecursionError):
        return None
    scores = answer.get("dimensional_scores") if isinstance(answer, dict) else None
    if not is_scores(scores):
        return None
    overall = answer.get("overall_score")
    if "overall_score" in answer and not (is_number(overall) and 1 <= overall <= 5):
        return None
    return {"dimensional_scores": scores, "overall_score": None if overall is None else float(overall)}


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_scores(scores) -> bool:
    """Whether this is a sub-score, 0, 1, 2 or "N/A", for each of the five dimensions and nothing else."""
    return (isinstance(scores, dict) and set(scores) == set(DIMENSIONS)
            and all(value == "N/A" if isinstance(value, str) else is_number(value) and value in (0, 1, 2)
                    for value in scores.values()))


def follows_format(text: str) -> bool:
    """Whether a CoT keeps the format exactly: one <think> block with something in it, then one <answer> block that
    `parse_cot` accepts, nothing but white space around them and no further tag in them."""
    match = LAYOUT.fullmatch(text)
    return bool(match and match[1].strip() and len(TAG.findall(text)) == 4 and parse_cot(text))


def agreement(scores: dict, reference: dict) -> float:
    """Share of the reference sub-scores that are matched exactly, "N/A" included; in [0, 1]."""
    return sum(scores.get(dimension) == value for dimension, value in reference.items()) / len(reference)


def overall_score(scores: dict) -> float | None:
    """An overall score in [1, 5] from sub-scores: their mean, primary dimensions twice as heavy, "N/A" left out, so
    that 0 maps to 1 and 2 to 5. None where every dimension is "N/A"."""
    weighed = [(2 if name in PRIMARY else 1, value) for name, value in scores.items() if value != "N/A"]
    return 1 + 2 * sum(w * value for w, value in weighed) / sum(w for w, _ in weighed) if weighed else None


def implied_overall(text: str) -> float | None:
    """What a CoT says of its video on a scale of 1 to 5: its overall_score, else its weighted sub-scores."""
    cot = parse_cot(text)
    if cot is None:
        return None
    return overall_score(cot["dimensional_scores"]) if cot["overall_score"] is None else cot["overall_score"]


# ---------------------------------------------------------------------------------------------------------------------
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

    @property
    def human(self) -> int:
        """+1 (A is better), -1 (B is better), 0 (tie)."""
        return {"A": 1, "B": -1, "tie": 0}[self.preference]

    def videos(self) -> list[tuple[str, str]]:
        """The two (video, prompt) keys by which a video's judgement is known."""
        return [(self.video_a, self.prompt), (self.video_b, self.prompt)]


def read_pairs(path: str | Path) -> list[Pair]:
    """Read a pair file: one JSON object a line (README, "Pair files"). Raises DataError naming the file and the row."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    pairs = []
    for row, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, row {row}: not JSON ({error})") from error
        pairs.append(make_pair(record, path, row))
    if not pairs:
        raise DataError(f"{path}: no pairs in it")
    return pairs


def make_pair(record: dict, path: Path, row: int) -> Pair:
    """Check one record of a pair file and resolve its paths."""
    if not isinstance(record, dict):
        raise DataError(f"{path}, row {row}: not a JSON object")
    for key in ("prompt", "video_a", "video_b", "preference"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise DataError(f"{path}, row {row}: {key!r} is missing or not a text")
    if record["preference"] not in ("A", "B", "tie"):
        raise DataError(f"{path}, row {row}: preference is {record['preference']!r}, not 'A', 'B' or 'tie'")
    for key in ("scores_a", "scores_b"):
        if record.get(key) is not None and not is_scores(record[key]):
            raise DataError(f"{path}, row {row}: {key} is not 0, 1, 2 or \"N/A\" for each of {', '.join(DIMENSIONS)}")
    for key in ("cot_a", "cot_b", "model_a", "model_b"):
        if not isinstance(record.get(key), (str, type(None))):
            raise DataError(f"{path}, row {row}: {key} is not a text")
    known = {field.name: record.get(field.name) for field in fields(Pair)}
    return Pair(**known | {key: str(path.parent / record[key]) for key in ("video_a", "video_b")})


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


# ---------------------------------------------------------------------------------------------------------------------
# Annotation and the consistency filter


def annotate(pairs_file: Path, out: Path, model_source: str, max_new_tokens: int, temperature: float, batch_size: int,
             seed: int) -> None:
    """Let a backbone write a CoT for every video of a pair file, each (video, prompt) once.

    CoTs are appended to OUT.cots as they come; a run that was cut off goes on behind the last whole batch and ends with
    the same file."""
    from tqdm import tqdm

    from model import DeScore

    pairs = read_pairs(pairs_file)
    keys = list(dict.fromkeys(key for pair in pairs for key in pair.videos()))
    written = out.with_name(out.name + ".cots")
    lines = written.read_text(encoding="utf-8").splitlines(keepends=True) if written.is_file() else []
    lines = [line for line in lines if line.endswith("\n")]
    lines = lines[: len(lines) // batch_size * batch_size]
    out.parent.mkdir(parents=True, exist_ok=True)
    written.write_text("".join(lines), encoding="utf-8")
    if lines:
        print(f"{written}: going on after {len(lines)} of {len(keys)} videos")
    model = DeScore.load(model_source)
    judged = model.judge(keys, max_new_tokens, temperature, seed, batch_size, first=len(lines))
    with written.open("a", encoding="utf-8") as file:
        for record in tqdm(judged, "annotate", total=len(keys), initial=len(lines), unit="video"):
            lines.append(json.dumps(record["cot"], ensure_ascii=False) + "\n")
            file.write(lines[-1])
            file.flush()
    cots = dict(zip(keys, map(json.loads, lines), strict=True))
    for pair in pairs:
        pair.cot_a, pair.cot_b = (cots[key] for key in pair.videos())
    write_pairs(out, pairs)
    written.unlink()


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
    return "the CoTs imply a tie" if implied == 0 else "the label is a tie" if pair.human == 0 else "the CoTs imply the other"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("annotate", help="let a backbone write a CoT for every video of a pair file")
    sub.add_argument("pairs", type=Path)
    sub.add_argument("out", type=Path)
    sub.add_argument("--model", required=True, help="a Qwen3-VL or a saved DeScore, directory or hub id")
    sub.add_argument("--max-new-tokens", type=int, default=4096)
    sub.add_argument("--temperature", type=float, default=1.0)
    sub.add_argument("--batch-size", type=int, default=16, help="videos at a time")
    sub.add_argument("--seed", type=int, default=0)
    sub = commands.add_parser("filter", help="keep the pairs whose two CoTs imply the human label")
    sub.add_argument("pairs", type=Path)
    sub.add_argument("out", type=Path)
    args = parser.parse_args()
    try:
        if args.command == "annotate":
            annotate(args.pairs, args.out, args.model, args.max_new_tokens, args.temperature, args.batch_size, args.seed)
        else:
            pairs = read_pairs(args.pairs)
            verdicts = [consistent(pair) for pair in pairs]
            write_pairs(args.out, [pair for pair, verdict in zip(pairs, verdicts) if verdict == "kept"])
            print(f"{args.out}: " + ", ".join(f"{count} {verdict}" for verdict, count in Counter(verdicts).most_common()))
    except DataError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
