"""Videos as the requests of `tools.serve` hold them."""

import argparse
import base64
import hashlib
import io
import json
import math
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from data import DataError, VideoSettings, error_context, open_file, open_video, smart_nframes
from support.frames import ERRORS, Video, opened
from tools.client import from_picture, grey_levels
from tools.memory import Clip


class Pngs(Clip):
    """A clip of PNG files in base64; a frame is decoded when it is read. Where the `shown` second of
    each is given, the model is to look at every frame."""

    def __init__(self, texts: list[str], fps: float, max_pixels: int,
                 shown: list[float] | None = None):
        self.texts, self.max_pixels, self.shown = texts, max_pixels, shown
        parts = [repr(shown).encode(), *(f"{len(text)} {text}".encode() for text in texts)]
        # At so low a rate `data.smart_nframes` leaves no frame out.
        super().__init__(len(texts), fps if shown is None else 1e-6, parts)

    @property
    def seconds(self) -> list[float]:
        return self.shown or super().seconds

    def check_seconds(self, settings: VideoSettings) -> None:
        """DataError where the frames and their seconds cannot have been chosen by these settings."""
        in_order = self.shown == sorted(self.shown) and all(0 <= x < 1e9 for x in self.shown)
        if len(self.shown) != self.total or not in_order:
            raise DataError("seconds are not one for each frame, in order")
        if self.total > 1 and smart_nframes(self.total, self.fps, settings) != self.total:
            raise DataError(f"{self.total} frames are chosen, not an even number up to "
                            f"{settings.max_frames}")

    def pixels(self) -> int:
        """How many its frames announce, before any is decoded; of those that may be."""
        found = 0
        for text in self.texts:
            with suppress(ValueError, struct.error):  # which is said when it is read
                width, height = announced(text)
                found += width * height * (width * height <= self.max_pixels)
        return found

    def picture(self, index: int) -> np.ndarray:
        # Whatever a hostile file makes the decoder raise.
        with error_context(f"frame {index} is no PNG that can be read", Exception):
            file = io.BytesIO(base64.b64decode(self.texts[index], validate=True))
            with Image.open(file, formats=("PNG",)) as image:
                if image.size != announced(self.texts[index]):  # it has a second header
                    raise ValueError(f"it begins as one of another size than {image.size}")
                check_pixels(*image.size, self.max_pixels)
                return grey_levels(from_picture(image))


class Stored(Clip):
    """A video file below a folder, called by its name, for where it lies is nobody's affair. One
    that was sent is removed when nobody needs it any more."""

    def __init__(self, path: Path, name: str, folder: Path, args: argparse.Namespace):
        self.path, self.name, self.folder = path, name, folder
        try:
            self.video = check_file(path, args)
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        except (OSError, *ERRORS) as error:  # as a DataError is
            raise DataError(self.hidden(error)) from None
        super().__init__(self.video.total, self.video.fps, [json.dumps(name).encode(), content])

    @property
    def seconds(self) -> list[float]:
        return self.video.seconds

    def pixels(self) -> int:
        return math.prod(self.video.size) * self.total

    def frames(self, indices: list[int]) -> Iterator[np.ndarray]:
        try:
            yield from self.video.frames(indices)
        except (OSError, *ERRORS) as error:
            raise ValueError(self.hidden(error)) from None

    def hidden(self, error: Exception) -> str:
        """An error without the path, or what is left of one that was cut."""
        return str(error).replace(str(self.path), self.name).replace(f"{self.folder}/", "")

    def __str__(self) -> str:
        return self.name


def announced(text: str) -> tuple[int, int]:
    """Width and height, as a PNG file in base64 begins with them. ValueError or struct.error if it
    is none."""
    return struct.unpack(">16xII", base64.b64decode(text[:32]))


def check_pixels(width: int, height: int, most: int) -> None:
    if width * height > most:
        raise ValueError(f"{width} x {height} pixels a frame, more than {most:,}")


def check_file(path: Path, args: argparse.Namespace) -> Video:
    """The video in a file. Raises DataError if there is none, or a larger one than is served."""
    with error_context(f"{path}: not a video that can be read", OSError, *ERRORS):
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        with opened(path) as (container, stream):
            check_pixels(stream.codec_context.width, stream.codec_context.height, args.max_pixels)
            # Some files tell their length only when they are decoded; a frame has two packets at most.
            packets = sum(packet.size > 0 for packet in container.demux(stream))
        if packets > 2 * args.max_frames:
            raise DataError(f"{packets:,} packets, more than {args.max_frames:,} frames have")
        video = open_file(path, args.reader)
        check_pixels(*video.size, args.max_pixels)  # as it is shown
        check_length(video.total, args)
        return video


def check_length(frames: int, args: argparse.Namespace) -> None:
    if frames > args.max_frames:
        raise DataError(f"{frames:,} frames, more than {args.max_frames:,}")


def looked_at(texts: list[str], fps: float, settings: VideoSettings) -> tuple[list[str], list[float]]:
    """Those of all frames at which a model looks, and the second of each."""
    with open_video(Clip(len(texts), fps, ()), settings) as (_, indices, seconds):
        shown = dict(zip(indices, seconds))  # a single frame is looked at twice
    return [texts[index] for index in shown], list(shown.values())
