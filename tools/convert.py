"""Write any pair file in our own format.

    python -m tools.convert videogen-rewardbench.csv pairs.jsonl --root VIDEOS --label TA
"""

import argparse
from pathlib import Path

from support.command import run_command
from support.formats import read_pairs
from tools.formats import check_out, write_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("pairs", type=Path, help="a pair file of any known kind")
    add("out", type=Path, help="a file in our own format, JSON lines")
    add("--label", help="the preference's column, if there are several [TA, else Overall]")
    add("--root", type=Path, help="folder that the file's paths are relative to [its own]")
    args = parser.parse_args()
    check_out(args.out, args.pairs)
    pairs = read_pairs(args.pairs, args.label, args.root)
    write_pairs(args.out, pairs)
    print(f"{args.out}: from {pairs.summary()}")


if __name__ == "__main__":
    run_command(main)
