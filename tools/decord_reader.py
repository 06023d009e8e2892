"""The other reader of video files, decord, which the paper names: `--reader decord`.

It decodes the files of which it shows what PyAV shows; all others, and whatever it cannot do, are
left to PyAV (support/frames.py)."""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from support.frames import Video

# Of these both make the same red, green and blue, where the sides are even.
EXACT = ("yuv420p", "yuv444p")


class DecordVideo(Video):
    """A file whose frames decord decodes, if it `suits_decord`. It does not notice that a frame is
    damaged, and may hang on one that is; all else is read and checked as ever."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.by_decord = suits_decord(self)

    def frames(self, indices: list[int]) -> Iterator[np.ndarray]:
        if self.by_decord:
            # Whatever decord cannot do is left to PyAV, which says what is wrong with a file.
            with suppress(Exception):
                for picture in self.decord_frames(indices):
                    yield picture
                    indices = indices[1:]
                return
        yield from super().frames(indices)

    def decord_frames(self, indices: list[int]) -> Iterator[np.ndarray]:
        """`frames` by decord. ValueError where they would not be PyAV's."""
        first = next(self.decode())
        shape = (first.height, first.width, 3)
        # fault_tol: that it makes a frame up from its neighbours is an error.
        reader = import_decord().VideoReader(f"file:{self.path}", num_threads=1, fault_tol=1e-9)
        if "DISPLAYMATRIX" in first.side_data or len(reader) != self.total:
            raise ValueError("it is turned, or decord counts its frames otherwise")
        for index, times in Counter(indices).items():
            reader.seek_accurate(index)  # forward, from the one keyframe
            picture = reader.next().asnumpy()
            if picture.shape != shape:  # narrow ones get a fourth colour
                raise ValueError(f"a frame of shape {picture.shape}, not {shape}")
            yield from [picture] * times


def suits_decord(video: Video) -> bool:
    """Whether decord shows of a file what PyAV does: the packets tell when each frame is shown
    (`packet_stamps`), all are shown, only at the first can decoding begin, both make the same
    colours of their pixels, and these are square and all shown."""
    if video.stamps is None or len(video.stamps) < len(video.packets):
        return False
    keyframes = [packet.is_keyframe for packet in video.packets]
    width, height = video.size
    exact = video.pix_fmt in EXACT and width % 2 == height % 2 == 0
    as_coded = video.pixel_aspect == 1 and not any(video.crop)
    return exact and as_coded and keyframes[0] and sum(keyframes) == 1


def import_decord():
    """The package, which prints nothing. ImportError or OSError if it is not there."""
    import decord  # where it is chosen; it brings an FFmpeg of its own

    decord.logging.set_level(decord.logging.QUIET)
    return decord
