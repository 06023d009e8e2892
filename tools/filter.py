"""Keep the pairs whose two annotations imply the human label: the consistency filter of both stages.

    python -m tools.filter annotated.jsonl train.jsonl

A pair's annotations are the overall scores that it holds, from whoever saw both videos (annotate
--together); where it holds none, its CoTs; and where it has none, its reference sub-scores.
"""

import argparse
from collections import Counter
from pathlib import Path

from data import DIMENSIONS, TAGS, Pair, overall_of, overall_score, per_video
from support.command import run_command
from support.files import local_folder, read_info
from support.formats import read_pairs
from tools.forgiving import read_annotation
from tools.formats import check_out, write_pairs


def consistent(pair: Pair, dimensions: dict[str, int] = DIMENSIONS,
               tags: tuple[str, str] = TAGS) -> str:
    """Whether the preference that a pair's annotations imply is the human label: "kept", or why not."""
    cots, scores, overalls = (per_video([pair], field) for field in ("cot", "scores", "overall"))
    if None not in overalls:
        a, b = overalls
    elif cots == [None, None] and None not in scores:
        a, b = (overall_score(found, dimensions) for found in scores)
    elif None in cots:
        return "no CoT"
    else:
        a, b = (overall_of(read_annotation(cot, dimensions, tags), dimensions) for cot in cots)
    if a is None or b is None:
        return "an annotation that says nothing"
    implied = (a > b) - (a < b)
    if implied == pair.human:
        return "kept"
    if implied == 0:
        return "the annotations imply a tie"
    return "the label is a tie" if pair.human == 0 else "the annotations imply the other"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("pairs", type=Path, help="a pair file with CoTs or sub-scores")
    add("out", type=Path, help="a file in our own format, JSON lines")
    add("--model", help="the saved model whose dimensions and tags the CoTs have [data.DIMENSIONS, TAGS]")
    args = parser.parse_args()
    check_out(args.out, args.pairs)
    info = read_info(local_folder(args.model)) if args.model else {}
    dimensions = info.get("dimensions", DIMENSIONS)
    tags = tuple(info.get("tags", TAGS))
    pairs = read_pairs(args.pairs, dimensions=dimensions)
    print(pairs.summary())
    verdicts = [consistent(pair, dimensions, tags) for pair in pairs]
    write_pairs(args.out, [pair for pair, verdict in zip(pairs, verdicts) if verdict == "kept"])
    counts = Counter(verdicts).most_common()
    print(f"{args.out}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts))


if __name__ == "__main__":
    run_command(main)
