"""Judgements that outlast the command that makes them, and what made them."""

import hashlib
import json
import math
import os
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch

from data import DataError, Key, error_context
from model import OWN
from support.files import digest, lock

# What stands in a record, by type, and what must, by --cot: on, off, or CoTs alone.
KINDS = {"video": str, "prompt": str, "cot": str, "truncated": bool, "score": float,
         "score_no_cot": float, "videos": list, "first": str}
NEEDED = {"on": ["video", "prompt", "cot", "truncated", "score", "score_no_cot"],
          "off": ["video", "prompt", "score_no_cot"], None: ["video", "prompt", "cot"],
          "together": ["videos", "prompt", "first", "cot"]}
ODD = 0x9E3779B97F4A7C15 - 2**64  # 2⁶⁴ over the golden ratio; its bits are well mixed
# The settings of infer and annotate that decide a record, beside the model's weights.
DECIDING = ("api", "api_model", "api_clips", "think_at_model", "cot", "samples", "temperature", "seed",
            "max_new_tokens", "repetition_penalty", "together")
# Of these, what changes nothing is not written: files from before there was such a setting go on.
NEUTRAL = {"api_clips": False, "think_at_model": None, "repetition_penalty": 1.0, "together": False}
# The fingerprint of weights has the model's configuration in it, which says the version.
SHOWN = {"weights": "weights (or the version of transformers)"}


class Journal:
    """Records of (video, prompt) keys, or (video, video, prompt) where both of a pair were seen
    together, in a file of JSON lines, which is only appended to, so that a command that was cut off
    goes on behind them. Its first line says what made the others.

    A line also says what its videos were ("files": size, mtime_ns, sha256 of each), for videos are
    known by name. A record of which a video has changed since is not taken up. `records` are
    without it."""

    def __init__(self, path: Path, made_by: dict, keys: list[Key], free: tuple[str, ...] = ()):
        """made_by: what decides the records; free: the names of what in it may differ now. Raises
        DataError, naming the row, if the file holds anything but records of these keys, or something
        else has made them."""
        self.path, self.keys, self.free = path, set(keys), free
        self.fields = NEEDED["together" if made_by.get("together") else made_by.get("cot")]
        self.made_by = json.loads(json.dumps(made_by))  # as it will be read
        self.records: dict[Key, dict] = {}
        # Of each video, before any of them is read.
        self.stamps = {video: stamp(video) for *videos, _ in keys for video in videos}
        self.sums: dict[str, str] = {}  # of videos by name
        self.of_others: set[Key] = set()  # judged when their names stood for other videos
        self.unchecked = 0  # records that do not say what their videos were
        first = json.dumps({"made_by": self.made_by}) + "\n"
        with error_context(f"{path}: cannot be written", OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = path.open("a")
            lock(self.lock, f"{path}: another command writes to it")
        content = path.read_bytes() if path.is_file() else b""
        *lines, half = content.split(b"\n")
        if not lines and not first.encode().startswith(half):
            lines = [half]  # no half of ours: somebody's file, which `read` refuses
        for row, line in enumerate(lines, 1):
            other = f"{path}, row {row}: not of this command; remove the file or choose another"
            with error_context(other, ValueError, LookupError, TypeError, RecursionError):
                self.read(row, json.loads(line))
        if half:  # what a kill has left of a line is written anew
            os.truncate(path, len(content) - len(half))
        if not lines:
            self.append(first)
        self.report()
        if self.records:
            what = "pairs" if made_by.get("together") else "videos"
            print(f"{path}: going on after {len(self.records)} of {len(keys)} {what}", file=sys.stderr)

    def read(self, row: int, record: dict) -> None:
        """Take up a line of the file, if it is what this command would write."""
        if row == 1:
            if "made_by" not in record:
                raise ValueError("it does not say what made the file")
            before, now = record["made_by"], self.made_by
            names = [name for name in {**before, **now} if name not in self.free]
            differ = [SHOWN.get(name, name) for name in names if before.get(name) != now.get(name)]
            if differ:
                raise DataError(f"{self.path}: made otherwise than this command would, by "
                                f"{', '.join(differ)}; remove the file or choose another")
            return
        for name in self.fields:
            if not fits(record[name], KINDS[name]):
                raise TypeError(f"{name} is {record[name]!r}")
        key = key_of(record)
        if key not in self.keys:
            raise DataError(f"{self.path}: holds judgements of other videos; remove it or choose "
                            "another file")
        *videos, _ = key
        files = record.pop("files", None)
        if files is None:
            self.unchecked += any(self.stamps[video] is not None for video in videos)
        if files is None or all(map(self.is_still, videos, files)):
            self.records[key] = record
        else:
            self.of_others.add(key)

    def is_still(self, video: str, was: dict) -> bool:
        """Whether a file is what it was: of the same size and time, or else of the same content. One that
        is gone is no other."""
        size, mtime_ns, sha256 = was["size"], was["mtime_ns"], was["sha256"]
        if self.stamps[video] in (None, {"size": size, "mtime_ns": mtime_ns}):
            return True
        return sha256 is not None and self.sum_of(video) == sha256

    def sum_of(self, video: str) -> str | None:
        """SHA-256 of a file; None if it is no longer what it was when this command began, for then
        nobody knows which of the two was judged."""
        if stamp(video) != self.stamps[video]:
            return None
        if video not in self.sums:
            self.sums[video] = digest(Path(video))
        return self.sums[video]

    def report(self) -> None:
        """Say of which videos the records are not, or may not be, what is there now."""
        if self.unchecked:
            print(f"warning: {self.path}: {self.unchecked} judgements do not say what their videos were; "
                  "they are kept, though a video may have changed since", file=sys.stderr)
        changed = [key[0] for key in self.of_others if key not in self.records]
        if changed:
            what = "pairs" if self.made_by.get("together") else "videos"
            print(f"{self.path}: {len(changed)} {what} have changed since they were judged, and are judged "
                  f"anew (the first: {min(changed)})", file=sys.stderr)

    def add(self, record: dict) -> None:
        """Add what was found of a key. One that could not be read is left for another time."""
        if "error" in record:
            return
        self.records[key_of(record)] = record
        *videos, _ = key_of(record)
        if not any(self.stamps[video] is None for video in videos):
            files = [self.stamps[video] | {"sha256": self.sum_of(video)} for video in videos]
            record = record | {"files": files}
        self.append(json.dumps(record, allow_nan=False) + "\n")

    def append(self, line: str) -> None:
        message = f"{self.path}: cannot be written; once it can, the same command goes on"
        # Opened for each line: what could not be written is not tried again at the end.
        with error_context(message, OSError), self.path.open("a", encoding="utf-8") as file:
            file.write(line)


def stamp(video: str) -> dict[str, int] | None:
    """The size and the time of the last change of a file; None where there is none."""
    try:
        status = os.stat(video)
    except (OSError, ValueError):
        return None
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def key_of(record: dict) -> tuple[str, ...]:
    """What a record is about: its video, or its two, and the prompt."""
    videos = record["videos"] if "videos" in record else [record["video"]]
    return (*videos, record["prompt"])


def fits(value, kind: type) -> bool:
    return type(value) is kind and (kind is not float or math.isfinite(value))


def deciding(settings: dict) -> dict:
    """Those of a command's settings that decide its records."""
    return {name: value for name, value in settings.items()
            if name in DECIDING and not (name in NEUTRAL and value == NEUTRAL[name])}


def made_by(model, args: Namespace, scores: bool = True) -> dict:
    """What makes the records of a model: its weights, what it is shown, how it thinks and, unless it only
    thinks, how it `scores`."""
    processor = model.processor
    settings = dict(vars(args))
    if settings.get("repetition_penalty") is None:
        settings["repetition_penalty"] = model.own_penalty(settings.get("temperature", 0.0))
    return deciding(settings) | {
        "weights": fingerprint(model, scores), "dtype": str(model.dtype),
        "instruction": processor.instruction, "video": asdict(processor.settings),
        "layout": model.info.get("scoring_layout", "ours"), "scoring_video": model.info.get("scoring_video"),
        **({"opening": processor.opening} if processor.opening else {})}


def open_journal(path: Path, model, args: Namespace, keys: list[Key]) -> Journal:
    """The file in which a model's judgements of these keys stand, or will."""
    return Journal(path, made_by(model, args), keys)


def fingerprint(model, scores: bool = True) -> str:
    """A name for the weights that a model has, wherever they came from: SHA-256 over sums of their
    bits, each by an odd number of its place, which are exact and quick on any device, and over
    what else makes it: settings and tokenizer. Without what `scores`, query and head, which are drawn
    at random for a bare backbone, it is one for what thinks."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if name.startswith(OWN) and not scores:
            continue
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        total = 0
        for part in tensor.contiguous().view(bits).flatten().split(2**24):
            odd = torch.arange(1, 2 * len(part), 2, device=part.device) * ODD
            total = (total * ODD + (part.long() * odd).sum().item()) % 2**64
        found.update(f"{name} {tuple(tensor.shape)} {total}\n".encode())
    found.update(model.qwen.config.to_json_string().encode())
    for adapter in getattr(model.backbone, "peft_config", {}).values():
        names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
        found.update(str([getattr(adapter, name) for name in names]).encode())
    found.update(model.processor.tokenizer.backend_tokenizer.to_str().encode())
    return found.hexdigest()
