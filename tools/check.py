"""Read a pair file whole, open every video as a model would, print a summary.

    python -m tools.check videogen-rewardbench.csv --root VIDEOS --model Qwen/Qwen3-VL-8B-Instruct
    python -m tools.check train.jsonl --test test.jsonl    # and which pairs are in both

Exit code 1 if any video is broken or missing.
"""

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer

from data import DataError, Processor, VideoSettings, error_context, read_video
from support.command import READER, Count, Positive, run_command
from support.formats import read_pairs
from support.frames import ERRORS, opened
from tools.protocol import findings

EMBEDDED = Path(__file__).resolve().parent.parent / "toy/backbone"


def check(path: Path, settings: VideoSettings, label: str | None = None, root: Path | None = None,
          tokenizer: str | Path = EMBEDDED, reader: str = "av", tests: Sequence[Path] = ()) -> bool:
    """Read a pair file (`read_pairs`) and each video with its prompt, and print what they are.

    tokenizer: directory or hub id of the one that counts tokens; reader: of video files
    (`data.read_video`). tests: pair files, of whose pairs is said which of them are in this file.
    Returns False if any video is broken or missing. Raises DataError as `read_pairs` does, and if
    there is no such tokenizer."""
    with error_context(f"{tokenizer}: no tokenizer that can be read", OSError, ValueError):
        counter = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    processor = Processor(counter, settings, reader=reader)
    pairs = read_pairs(path, label, root)
    print(pairs.summary())
    found = findings(pairs)
    for test in tests:
        test_pairs = read_pairs(test, label, root)
        found += [test_pairs.summary(), *findings(test_pairs, pairs)]
    for line in found:
        print(line)
    print("labels: " + listed(Counter(pair.preference for pair in pairs), " "))

    prompts = {}  # video → one of its prompts
    for pair in pairs:
        prompts.update(pair.videos())
    broken, interlaced, sizes, figures = [], [], Counter(), []
    for video, prompt in tqdm(sorted(prompts.items()), "check", unit="video"):
        try:
            frames, seconds = read_video(video, settings, reader)
        except DataError as error:
            broken.append(str(error))
            continue
        if is_interlaced(video):
            interlaced.append(video)
        sample = processor.sample(frames, seconds, prompt)
        video_tokens = math.prod(sample.grid) // settings.merge_size**2
        figures.append((len(sample.input_ids), video_tokens, seconds[-1]))
        sizes[f"{frames.shape[3]}x{frames.shape[2]}"] += 1

    names = ("tokens a sample", "video tokens a sample", "seconds a video")
    for name, values in zip(names, zip(*figures)):
        middle = statistics.median(values)
        print(f"{name}: {min(values):.0f} to {max(values):.0f}, median {middle:.0f}")
    print("sizes at the model: " + listed(sizes, " of "))
    if interlaced:
        print("interlaced, read with both fields of a frame woven together:", len(interlaced))
        print("\n".join(interlaced))
    print("\n".join([f"videos: {sizes.total()} read, {len(broken)} broken", *broken]))
    return not broken and not any(row["reason"] == "missing" for row in pairs.left_out)


def is_interlaced(video: str) -> bool:
    """Whether any of a file's first frames holds two moments, its fields."""
    with suppress(*ERRORS), opened(video) as (container, stream):  # decord may have read more
        return any(frame.interlaced_frame for frame in islice(container.decode(stream), 8))
    return False


def listed(counts: Counter, between: str) -> str:
    return ", ".join(f"{count}{between}{name}" for name, count in counts.most_common(8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("pairs", type=Path, help="a pair file of any known kind")
    add("--label", help="the preference's column, if there are several [TA, else Overall]")
    add("--root", type=Path, help="folder that the file's paths are relative to [its own]")
    add("--fps", type=Positive, default=2.0, help="frames sampled a second")
    add("--min-pixels", type=Count, default=VideoSettings.min_pixels, help="a frame, at least")
    add("--max-pixels", type=Count, default=448 * 448, help="a frame, at most")
    add("--model", default=EMBEDDED,
        help="whose tokenizer counts the tokens, directory or hub id [the embedded one]")
    add("--test", nargs="+", type=Path, default=[],
        help="pair files to test on: says which of their pairs are among these")
    add("--reader", **READER)
    args = parser.parse_args()
    with error_context("the frames cannot be so", TypeError):
        settings = VideoSettings(args.fps, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
    good = check(args.pairs, settings, args.label, args.root, args.model, args.reader, args.test)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    run_command(main)
