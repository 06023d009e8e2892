"""Write any pair file in our own format, or pairs of videos that were rated one by one.

    python -m tools.convert videogen-rewardbench.csv pairs.jsonl --root VIDEOS --label TA
    python -m tools.convert --rated ratings.csv pairs.jsonl --score quality alignment
"""

import argparse
import sys
from pathlib import Path

from support.command import Count, Whole, run_command
from support.formats import read_pairs
from tools.formats import check_out, write_pairs
from tools.protocol import findings
from tools.rated import rated_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("pairs", type=Path, help="a pair file of any known kind")
    add("out", type=Path, help="a file in our own format, JSON lines")
    add("--label", help="the preference's column, if there are several [TA, else Overall]")
    add("--root", type=Path, help="folder that the file's paths are relative to [its own]")
    add("--rated", action="store_true", help="the file has a rated video a row, JSON lines or CSV: "
        "of two of a prompt the one with the higher mean is preferred")
    add("--prompt", default="prompt", help="with --rated: the column of the prompt")
    add("--video", default="video", help="with --rated: the column of the video's path")
    add("--score", nargs="+", default=["score"], help="with --rated: the columns of its scores")
    add("--per-prompt", type=Count, default=10, help="with --rated: the most pairs of a prompt")
    add("--total", type=Count, help="with --rated: the most pairs of all [any number]")
    add("--seed", type=Whole, default=0, help="with --rated: of the drawing of the pairs that are kept")
    args = parser.parse_args()
    check_out(args.out, args.pairs)
    if args.rated:
        pairs = rated_pairs(args.pairs, args.root, args.prompt, args.video, args.score,
                            args.per_prompt, args.total, args.seed)
    else:
        pairs = read_pairs(args.pairs, args.label, args.root)
    write_pairs(args.out, pairs)
    print(f"{args.out}: from {pairs.summary()}")
    sys.stderr.writelines(f"warning: {finding}\n" for finding in findings(pairs))


if __name__ == "__main__":
    run_command(main)
