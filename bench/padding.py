"""How much of what is computed is padding: rows as the file has them, and by length (data.packed, alike).

    python bench/padding.py                             # lengths drawn as in real use
    python bench/padding.py runs/toy/train_cots.jsonl   # of the embedded default, as its stages run

The drawn pairs: clips of 2 to 10 seconds in the usual shapes, 2 frames a second and 448 x 448 pixels a frame
at most, prompts of 20 to 150 words, CoTs of 150 to 900 tokens; the two clips of half of the pairs come from
one generator and are of one length. Both ways keep the same budget of tokens and the two clips of a pair
together.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from coldstart import chunks
from data import Processor, VideoSettings, alike, packed, read_pairs, smart_nframes, smart_resize

SHAPES = ((480, 832), (512, 512), (720, 1280), (832, 480), (768, 1024))  # height, width


def drawn(pairs: int) -> list[list[tuple[int, int]]]:
    """For each pair the tokens of its two prompts and of their CoTs."""
    rng, settings = np.random.default_rng(0), VideoSettings(max_pixels=448 * 448)

    def clip() -> int:
        frames = smart_nframes(int(24 * rng.uniform(2, 10)), 24, settings)
        h, w = smart_resize(*SHAPES[rng.integers(len(SHAPES))], frames, settings)
        return frames // 2 * (h * w // 32**2 + 7)  # 7: timestamp and marks

    found = []
    for _ in range(pairs):
        text, a = 180 + int(rng.integers(20, 150) * 1.3), clip()
        b = a if rng.random() < 0.5 else clip()
        found.append([(text + a, int(rng.integers(150, 900))), (text + b, int(rng.integers(150, 900)))])
    return found


def read(path: Path) -> list[list[tuple[int, int]]]:
    processor = Processor(AutoTokenizer.from_pretrained(ROOT / "toy/backbone"),
                          VideoSettings(min_pixels=4096, max_pixels=4096, patch_size=8),
                          "<video><prompt>" + " x" * 20)
    return [[(length, len(processor.encode(cot))) for length, cot in zip(processor.lengths(pair.videos()),
                                                                         (pair.cot_a, pair.cot_b))]
            for pair in read_pairs(path)]


def padding(units: list[list[int]], budget: int, by_length: bool) -> float:
    """Share of padding where units of rows go together within a budget of tokens."""
    widths = [len(rows) * max(rows) for rows in units]
    lists = packed(units, widths, budget) if by_length else chunks(units, max(1, budget // max(widths)))
    computed = 0
    for batch in [[row for rows in some for row in rows] for some in lists]:
        runs = alike(batch) if by_length else [range(len(batch))]  # what DeScore.runs takes side by side
        computed += sum(len(run) * max(batch[row] for row in run) for run in runs)
    return 1 - sum(map(sum, units)) / computed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pairs", type=Path, nargs="?",
                        help="a pair file with CoTs, on the embedded default's settings")
    args = parser.parse_args()
    toy = args.pairs is not None
    pairs = read(args.pairs) if toy else drawn(2048)
    rng = np.random.default_rng(1)
    masked = rng.random(len(pairs)) < 0.5
    whole = [[prompt + 1 + (0 if mask else cot) for prompt, cot in pair] for pair, mask in zip(pairs, masked)]
    prompts = [[prompt for prompt, _ in pair] for pair in pairs]
    clips = [[row] for pair in prompts for row in pair]
    step, budget = (16, 8192) if toy else (32, 24_576)
    print("| what | computed together | in the file's order | by length |\n| --- | --- | ---: | ---: |")
    for what, units, size, tokens in (("stage 1, one process", whole, step, budget),
                                      ("stage 1, 8 processes", whole, step // 8, budget),
                                      ("stage 2, the prompts", prompts, 8 if toy else 64, 4 * budget),
                                      ("evaluation, the prompts", clips, len(clips), 65_536)):
        shares = [units[start : start + size] for start in range(0, len(units) - size + 1, size)]
        figures = [np.mean([padding(share, tokens, by_length) for share in shares])
                   for by_length in (False, True)]
        print(f"| {what} | {size} {'clips' if units is clips else 'pairs'} within {tokens:,} tokens | "
              + " | ".join(f"{figure:.1%}" for figure in figures) + " |")


if __name__ == "__main__":
    main()
