"""What it costs to read a clip's sampled frames, by PyAV and by decord (`--reader`), and to outline it, in
seconds of the processor. decord does not read the last clip, which has more keyframes than one: PyAV does.

    python bench/frames.py --repeats 5
    python bench/frames.py --check FOLDER …     # whose frames both readers show, and whose they would not
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import VideoSettings, open_video
from support.frames import ERRORS, Video
from tools.decord_reader import DecordVideo, import_decord

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
    for _ in DecordVideo(path).frames(indices):
        pass


def same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    return len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs))


def alone(path: Path, indices: list[int]) -> list[np.ndarray]:
    """The frames as decord shows them of any file; none where it fails."""
    try:
        return list(import_decord().VideoReader(str(path), num_threads=1).get_batch(indices).asnumpy())
    except Exception:  # noqa: BLE001 (whatever it may be)
        return []


def check(paths: list[Path]) -> None:
    """Print of how many files the readers show the same, all frames and a few."""
    counts, rng = Counter(), np.random.default_rng(0)
    for path in paths:
        try:
            video, other = Video(path), DecordVideo(path)
        except ERRORS:
            continue
        few = sorted(rng.choice(video.total, min(video.total, 7), replace=False).tolist())
        wrong, wrong_alone = False, False
        for indices in (list(range(video.total)), few, [video.total - 1]):
            right = list(video.frames(indices))
            wrong |= not same(right, list(other.frames(indices)))
            wrong_alone |= not same(right, alone(path, indices))
        counts += Counter(files=1, read=by_decord(other), wrong=wrong, alone=wrong_alone)
    print(f"{counts['files']} files: {counts['read']} are read by decord, {counts['wrong']} have a wrong "
          f"frame; {counts['alone']} would have one if decord read them all")


def by_decord(video: DecordVideo) -> bool:
    """Whether decord has read it, not PyAV in its place."""
    try:
        return video.by_decord and len(list(video.decord_frames([0]))) == 1
    except Exception:  # noqa: BLE001 (whatever it may be)
        return False


def seconds(work, path: Path, indices: list[int]) -> float:
    """Of the processor, all threads together."""
    start = time.process_time()
    work(path, indices)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--check", type=Path, nargs="+", help="folders of videos; nothing is timed")
    args = parser.parse_args()
    if args.check:
        return check([path for folder in args.check for path in sorted(folder.iterdir()) if path.is_file()])
    print("| clip | frames | PyAV, s | decord, s | ratio | outline, s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, shape in CLIPS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            write(path, *shape)
            with open_video(path, VideoSettings()) as (_, indices, _):
                pass
            # In turn, so that what else the machine does falls on all of them.
            works = ours, theirs, outline
            rounds = [[seconds(work, path, indices) for work in works] for _ in range(args.repeats)]
            ratio = statistics.median(other / mine for mine, other, _ in rounds)
            mine, other, brief = [statistics.median(column) for column in zip(*rounds)]
            print(f"| {name} | {len(indices)} | {mine:.3f} | {other:.3f} | {ratio:.2f} | {brief:.3f} |",
                  flush=True)


if __name__ == "__main__":
    main()
