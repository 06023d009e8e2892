"""The frames of a video file by their number, as a player shows them. They are decoded forward from
the start, never sought: a jump lands where it should in some kinds of file only. PyAV decodes;
where decord's frames are the same, it may instead (tools/decord_reader.py)."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import av
import numpy as np

# Files that hold a video themselves. FFmpeg knows playlists too, which make it open other files.
CONTAINERS = "mov,matroska,avi,mpeg,mpegts,flv,asf,ogg,gif"
TIMED = ("mov", "matroska")  # in these each packet has its time,
PLAIN = ("h264", "hevc", "av1", "vp9")  # and of these codecs each is one frame that is shown
READERS = ("av", "decord")
MAX_PIXELS = 8192 * 8192  # a frame
# What is raised for a file that cannot be read.
ERRORS = (av.FFmpegError, LookupError, ValueError, ArithmeticError, MemoryError, RuntimeError)
LOGGING = Lock()  # PyAV's log level is one for all threads


class Video:
    """How many frames a file shows (`total`), how many a second (`fps`), the second of each
    (`seconds`, from 0.0), and the frames. Raises one of ERRORS where it cannot be read whole."""

    def __init__(self, path: str | Path):
        self.path = path
        with opened(path) as (container, stream):
            rate = float(stream.average_rate or 0)
            tick = float(stream.time_base)
            context = stream.codec_context
            self.pix_fmt = context.pix_fmt
            self.pixel_aspect = stream.sample_aspect_ratio or 1  # the container's before the codec's
            width = max(context.width, round(context.width * self.pixel_aspect))
            self.size = (width, context.height)  # as coded or, where that is wider, as shown
            if width * context.height > MAX_PIXELS:
                raise ValueError(f"{width} x {context.height} pixels a frame")
            self.crop = container_crop(container, stream)
            self.packets = read_packets(container, stream)
            self.stamps = packet_stamps(container, stream, self.packets)
        stamps = self.stamps
        if stamps is None:
            stamps = [frame.pts for frame in self.decode()]
        self.total = len(stamps)
        self.fps, self.seconds = timing(stamps, tick, rate)

    def frames(self, indices: list[int]) -> Iterator[np.ndarray]:
        """The frames (H, W, 3) uint8 at these indices, which rise and may repeat."""
        wanted = Counter(indices)
        count = 0
        first = None
        for count, frame in enumerate(self.decode(), 1):
            if count - 1 in wanted:
                first = first or frame
                yield from [self.shown(frame, first)] * wanted[count - 1]
        if count != self.total:
            raise ValueError(f"{self.total} frames are announced, {count} can be decoded")

    def shown(self, frame: av.VideoFrame, first: av.VideoFrame) -> np.ndarray:
        """A frame cropped, stretched and turned as a player does it; size and turn are the first's."""
        picture = frame.to_ndarray(format="rgb24", threads=1, width=first.width, height=first.height)
        left, right, top, bottom = self.crop
        if left + right >= first.width or top + bottom >= first.height:
            raise ValueError("all of a frame is cropped away")
        picture = picture[top : first.height - bottom, left : first.width - right]
        width = max(1, round(picture.shape[1] * self.pixel_aspect))
        if width != picture.shape[1]:
            stored = av.VideoFrame.from_ndarray(picture)
            picture = stored.to_ndarray(width=width, threads=1, interpolation="BICUBIC")
        return upright(picture, first).copy()

    def decode(self) -> Iterator[av.VideoFrame]:
        """All frames, in the order in which they are shown."""
        with opened(self.path) as (container, stream):
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise ValueError("a frame is damaged")
                yield frame


@contextmanager
def opened(path: str | Path):
    """An open file, and the stream in it that a player shows."""
    limit = {"max_pixels": str(MAX_PIXELS)}
    allowed = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:
        container = av.open(f"file:{path}", options=limit | allowed, metadata_errors="replace")
    except av.ArgumentError as error:
        raise ValueError(f"it is none of {CONTAINERS}") from error
    with container:
        stream = container.streams.best("video")
        context = stream and stream.codec_context
        if not context or stream.disposition & av.stream.Disposition.attached_pic:
            raise ValueError("it holds no video of a known codec")
        context.thread_count = 1  # loaders read several files at a time
        context.flags |= av.codec.context.Flags.unaligned  # else less is cropped at the left
        # An error where a player would guess what a damaged frame showed.
        context.options = limit | {"err_detect": "explode"}
        yield container, stream


def container_crop(container, stream) -> tuple[int, ...]:
    """How many pixels a player cuts off at the left, right, top, bottom because the container says
    so (MP4's clap, Matroska's PixelCrop). Only FFmpeg's description of the file tells."""
    with LOGGING:
        level = av.logging.get_level()
        try:
            av.logging.set_level(av.logging.INFO)
            described = container.dumps_format()
        finally:
            av.logging.set_level(level)
    _, _, described = described.partition(f"Stream #0:{stream.index}")
    own, _, _ = described.partition("Stream #0:")
    found = re.search(r"^ +Frame Cropping: (\d+)/(\d+)/(\d+)/(\d+)", own, re.MULTILINE)  # no title says it
    return tuple(map(int, found.groups())) if found else (0, 0, 0, 0)


def upright(picture: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """A picture (H, W, 3) turned and mirrored as its frame's display matrix says."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    # A pixel at (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    if min(abs(a), abs(b)) * 57 > max(abs(a), abs(b)):  # more than a degree off
        raise ValueError("it is turned by an angle that is no multiple of 90 degrees")
    if abs(b) > abs(a):  # the sides change places
        picture = picture.swapaxes(0, 1)
        a, d = c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


class Packet(NamedTuple):
    """What a packet of the stream says of itself."""

    pts: int | None
    is_keyframe: bool
    is_discard: bool


def read_packets(container, stream) -> list[Packet]:
    """The packets of a stream. ValueError if it is damaged or, where that can be seen, cut short:
    a file of FLV, MPEG-TS or -PS may end anywhere."""
    packets = []
    samples = 0
    end = 0.0  # in seconds, of the last packet of any stream
    last = b""
    for packet in container.demux():
        if packet.size and packet.pts is not None:
            end = max(end, float((packet.pts + packet.duration) * packet.time_base))
        if packet.stream_index != stream.index:
            continue
        if packet.is_corrupt:
            raise ValueError("it is damaged or cut short")
        samples += packet.dts is not None
        if packet.size:
            packets.append(Packet(packet.pts, packet.is_keyframe, packet.is_discard))
            last = bytes(packet)[-1:] if kind(container) == "gif" else b""
    if not {
        "mov": samples >= len(stream.index_entries),
        "gif": last == b";",
        "avi": is_whole_riff(Path(container.name.removeprefix("file:"))),
        # Its header says how long it is, give or take the last frame.
        "matroska": (container.duration or 0) / av.time_base <= end + 1.5 / (stream.average_rate or 10),
    }.get(kind(container), True):
        raise ValueError("it is cut short")
    return packets


def is_whole_riff(path: Path) -> bool:
    """Whether a file is as long as its header says, where it says so."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8)[4:], "little")
    return size == 2**32 - 1 or size + 8 <= path.stat().st_size


def packet_stamps(container, stream, packets: list[Packet]) -> list[int] | None:
    """When each frame is shown, in ticks, in order, without decoding; None where packets do not
    tell."""
    stamps = [packet.pts for packet in packets]
    fields = stream.codec_context.field_order > 1  # a packet may be half a frame
    if kind(container) not in TIMED or stream.codec.canonical_name not in PLAIN or fields:
        return None
    # What is shown before the first packet's frame may need frames that are not in the file.
    if not packets or None in stamps or not packets[0].is_keyframe or stamps[0] > min(stamps):
        return None
    return sorted(packet.pts for packet in packets if not packet.is_discard)


def kind(container) -> str:
    return container.format.name.partition(",")[0]


def timing(stamps: list[int | None], tick: float, rate: float) -> tuple[float, list[float]]:
    """Frames a second, and the second of each of `stamps` (in ticks). Where the file keeps to its
    `rate` (0.0: it has none) these are exactly the multiples of 1 / rate."""
    if not stamps:
        raise ValueError("it has no frames")
    steady = [index / rate for index in range(len(stamps))] if rate else []
    if None in stamps:
        if not rate:
            raise ValueError("it has no frame rate")
        return rate, steady
    stamps = sorted(stamps)
    seconds = [(stamp - stamps[0]) * tick for stamp in stamps]
    if rate:
        # Stamps are rounded to a tick, often of a millisecond.
        slack = 1.001 * min(max(tick, 0.001), 0.25 / rate)
        if max(abs(a - b) for a, b in zip(steady, seconds)) <= slack:
            return rate, steady
    return (len(seconds) - 1) / (seconds[-1] or 1), seconds
