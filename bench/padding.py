"""How much of what is computed is padding: rows as the file has them, and by length (support/batches.py).

    python bench/padding.py                             # lengths drawn as in real use
    python bench/padding.py runs/toy/train_cots.jsonl   # of the embedded default, as its stages run

The drawn pairs: clips of 2 to 10 seconds in the usual shapes, 2 frames a second and 448 x 448 pixels a frame
at most, prompts of 20 to 150 words, CoTs of 150 to 900 tokens; the two clips of half of the pairs come from
one generator and are of one length. Both ways keep the same budget of tokens and the two clips of a pair
together; where CoTs are still to be written, the budget counts the longest.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import Processor, VideoSettings, keys_of, read_pairs, smart_nframes, smart_resize
from support.batches import chunks, deal, group_by_length, prompt_lengths
from support.ranks import Ranks

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
    pairs = read_pairs(path)
    lengths = prompt_lengths(processor, keys_of(pairs))
    return [[(lengths[key], len(processor.encode(cot))) for key, cot in zip(pair.videos(),
                                                                            (pair.cot_a, pair.cot_b))]
            for pair in pairs]


def padding(units: list[list[int]], budget: int, by_length: bool, processes: int = 1, cots: int = 0) -> float:
    """Share of padding where units of rows go together within a budget of tokens, on some processes. `cots`:
    tokens that may be written behind a row."""
    sizes, lists = [len(rows) * (max(rows) + cots) for rows in units], []
    for rank in range(processes):
        if by_length:
            dealt = deal(units, sizes, budget, Ranks(rank, processes))
            lists += [[unit for unit, _ in micro_batch] for micro_batch in dealt]
        else:
            lists += chunks(units[rank::processes], max(1, budget // max(sizes)))
    computed = 0
    for batch in [[row for rows in some for row in rows] for some in lists]:
        side_by_side = group_by_length(batch) if by_length else [range(len(batch))]  # as DeScore.forwards
        computed += sum(len(rows) * max(batch[row] for row in rows) for rows in side_by_side)
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
    step, update, cot = (16, 8, 140) if toy else (32, 4, 4096)  # pairs, pairs, tokens
    budget, thinking = (8192, 36_000) if toy else (24_576, 65_536)  # --max-tokens, --think-tokens
    print("| what | computed together | in the file's order | by length |\n| --- | --- | ---: | ---: |")
    for what, units, size, tokens, *others in (
            ("stage 1, one process", whole, step, budget),
            ("stage 1, 8 processes", whole, step, budget, 8),
            ("stage 2, the prompts", prompts, update, thinking, 1, 8 * cot),
            ("evaluation, the prompts", clips, len(clips), thinking, 1, cot)):
        shares = [units[start : start + size] for start in range(0, len(units) - size + 1, size)]
        figures = [np.mean([padding(share, tokens, by_length, *others) for share in shares])
                   for by_length in (False, True)]
        print(f"| {what} | {size} {'clips' if units is clips else 'pairs'} within {tokens:,} tokens | "
              + " | ".join(f"{figure:.1%}" for figure in figures) + " |")


if __name__ == "__main__":
    main()
