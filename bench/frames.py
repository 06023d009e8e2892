"""What it costs to read a clip's sampled frames, and to outline it, in seconds of the processor.

    pip install decord==0.6.0               # to compare with; not needed otherwise
    python bench/frames.py --repeats 5
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import VideoSettings, open_video
from support.frames import Video

try:
    import decord
except ImportError:
    decord = None

# name: width, height, seconds, frames between keyframes
CLIPS = {"5 s, 832 x 480": (832, 480, 5, 1000), "5 s, 1280 x 720": (1280, 720, 5, 1000),
         "5 s, 1920 x 1080": (1920, 1080, 5, 1000),
         "60 s, 640 x 360, a keyframe every 2 s": (640, 360, 60, 48)}
FPS = 24


def write(path: Path, width: int, height: int, seconds: int, keyframe: int) -> None:
    """A drifting pattern with some grain, as H.264."""
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack([np.sin(x / 31), np.cos(y / 23), np.sin((x + y) / 47)], -1) * 100 + 128
    picture += np.random.default_rng(0).integers(-12, 12, (height, width, 1))
    picture = picture.clip(0, 255).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "23", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = keyframe
        for number in range(seconds * FPS):
            frame = np.roll(picture, (number, 3 * number), (0, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


def ours(path: Path, indices: list[int]) -> None:
    for _ in Video(path).frames(indices):
        pass


def outline(path: Path, indices: list[int]) -> None:
    next(Video(path).frames([0]))


def theirs(path: Path, indices: list[int]) -> None:
    decord.VideoReader(str(path), num_threads=1).get_batch(indices).asnumpy()


def seconds(work, path: Path, indices: list[int]) -> float:
    """Of the processor, all threads together."""
    start = time.process_time()
    work(path, indices)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print("| clip | frames | read, s | by decord, s | ratio | outline, s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, shape in CLIPS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            write(path, *shape)
            with open_video(path, VideoSettings()) as (_, indices, _):
                pass
            works = [ours, outline] + [theirs] * (decord is not None)
            # In turn, so that what else the machine does falls on all of them.
            rounds = [[seconds(work, path, indices) for work in works] for _ in range(args.repeats)]
            mine, brief, *other = [statistics.median(column) for column in zip(*rounds)]
            last = f"{other[0]:.3f} | {mine / other[0]:.2f} ×" if other else "– | –"
            print(f"| {name} | {len(indices)} | {mine:.3f} | {last} | {brief:.3f} |", flush=True)


if __name__ == "__main__":
    main()
