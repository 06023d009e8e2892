"""Attack what reads files: damaged videos, models and checkpoints, texts and pair files at random.

    python tests/attack.py                       # all of them
    python tests/attack.py --only videos --count 100000

Each must be read or refused with a DataError that names the file; what is not is printed and counted.
A checkpoint must be taken up exactly or passed over.
"""

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from damage import FATAL, damage

from data import DIMENSIONS, DataError, agreement, follows_format, implied_overall, parse_cot, read_video
from model import DeScore
from support.checkpoint import Checkpoints
from support.formats import read_pairs
from support.ranks import ALONE

GOLD = dict(zip(DIMENSIONS, (2, 1, "N/A", 0, 2)))
PIECES = [
    "<think>", "</think>", "<answer>", "</answer>", "```json", "```", "{", "}", "[", "]", '"', ":",
    ",", '"dimensional_scores"', *map(json.dumps, DIMENSIONS), "0", "1", "2", "NaN", "Infinity",
    '"N/A"', '"overall_score"', "9" * 400, "\\ud800", " ", "\n", "\r", "\u2028", "\u200b", "\0",
    "prompt", "video_a", "A", "same", "path_A,path_B,prompt,TA\n", "videos,GSB,prompt\n", "é"]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A file's content with one kind of damage."""
    at, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    few = min(end, at + rng.choice((1, 4, 64)))
    kind = rng.randrange(7)
    if kind == 0:
        return content[:at]  # cut off
    if kind == 1:
        return content[:at] + content[few:]  # some bytes gone
    if kind == 2:
        return content[:at] + rng.randbytes(few - at) + content[few:]
    if kind == 3:
        return content[:at] + bytes(few - at) + content[few:]
    if kind == 4:
        return content[:at] + rng.randbytes(8) + content[at:]
    if kind == 5:
        return content[:at] + content[at:few] * 2 + content[few:]
    bits = bytearray(content)
    for _ in range(rng.choice((1, 3, 30))):
        bits[rng.randrange(len(bits))] ^= 1 << rng.randrange(8)
    return bytes(bits)


def attempt(function, *arguments, named: Path | None = None) -> str:
    """What comes of a call: "read", "refused", or what is wrong with its error."""
    try:
        function(*arguments)
        return "read"
    except DataError as error:
        if named and str(named) not in str(error):
            return f"refused without its name: {error}"
        return "refused" if "\n" not in str(error) else f"refused in many lines: {error}"
    except Exception as error:  # noqa: BLE001  (that is what is counted)
        return f"{type(error).__name__}: {error}"


def videos(folder: Path, rng: random.Random) -> Iterator[str]:
    """Golden clips of each kind, damaged."""
    clips = [path for path in (ROOT / "tests/golden").rglob("*.*")
             if path.suffix in (".mp4", ".avi", ".mkv", ".webm", ".ts", ".mpg", ".gif", ".mov")]
    contents = [path.read_bytes() for path in sorted(clips)]
    place = folder / "clip.mp4"
    while True:
        place.write_bytes(damaged(rng.choice(contents), rng))
        yield attempt(read_video, place, named=place)


def texts(folder: Path, rng: random.Random) -> Iterator[str]:
    """Nonsense made of what CoTs are made of."""

    def look(text: str) -> None:
        cot, keeps = parse_cot(text), follows_format(text)
        assert cot or not keeps, "keeps the format and has no scores"
        assert cot is None or 0 <= agreement(cot["dimensional_scores"], GOLD) <= 1
        overall = implied_overall(text)
        assert overall is None or 1 <= overall <= 5

    good = json.dumps({"dimensional_scores": GOLD, "overall_score": 3})
    good = f"<think>It moves as asked.</think><answer>{good}</answer>"
    while True:
        text = "".join(rng.choices(PIECES, k=rng.randrange(40)))
        if rng.random() < 0.5:
            text = damaged(good.encode(), rng).decode(errors="replace")
        yield attempt(look, text)


def pairs(folder: Path, rng: random.Random) -> Iterator[str]:
    """Nonsense and damaged rows of pair files of every kind."""
    clip = str(next((ROOT / "tests/golden").glob("*.mp4")))
    own = {"prompt": "x", "video_a": clip, "video_b": clip, "preference": "A", "scores_a": GOLD}
    answer = {"video_1_scores": GOLD, "gsb_result": "A"}
    quoted = json.dumps(answer).replace('"', '""')
    good = [json.dumps(own) + "\n", f"path_A,path_B,prompt,TA\n{clip},{clip},x,same\n",
            f'videos,GSB,prompt\n"[\'{clip}\', \'{clip}\']",A,x\n',
            f'videos,answer,prompt\n"[\'{clip}\', \'{clip}\']","<answer>{quoted}</answer>",x\n']
    place = folder / "pairs.jsonl"
    while True:
        content = damaged(rng.choice(good).encode(), rng)
        if rng.random() < 0.3:
            content = "".join(rng.choices(PIECES, k=rng.randrange(30))).encode()
        place.write_bytes(content)
        yield attempt(read_pairs, place, named=place)


def models(folder: Path, rng: random.Random) -> Iterator[str]:
    """A saved adapter and a saved model of full weights with one fault each."""
    for rank in (2, 0):
        model = DeScore.load(ROOT / "toy/backbone", device="cpu")
        model.set_trainable(rank)
        model.save(folder / f"rank-{rank}")
    while True:
        fault = damage(folder / f"rank-{rng.choice((2, 0))}", folder / "damaged", rng)
        outcome = attempt(DeScore.load, folder / "damaged")
        fatal = outcome == "read" and fault.partition(": ")[2].startswith(FATAL)
        yield f"loaded in spite of {fault}" if fatal else outcome


def checkpoints(folder: Path, rng: random.Random) -> Iterator[str]:
    """Two checkpoints, the newer one damaged: it is taken up as it was, or the older is."""
    model = torch.nn.Linear(8, 8)
    model.trainable, model.device = lambda: dict(model.named_parameters()), torch.device("cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    (folder / "checkpoints").mkdir()
    saved = Checkpoints(folder / "checkpoints", 2, ALONE)
    saved.attach(model, optimizer)
    weights = {}
    for step in (1, 2):
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        saved.save(step, {"args": {}, "skipped": []})
        weights[step] = model.weight.detach().clone()

    def look() -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            state = saved.newest({})
        assert torch.equal(model.weight, weights[state["step"]]), "weights of another step"

    files = [*(folder / "checkpoints/step-2").iterdir()]
    while True:
        path = rng.choice(files)
        content = path.read_bytes()
        path.write_bytes(damaged(content, rng))
        yield attempt(look)
        path.write_bytes(content)


ATTACKS = {videos: 20_000, texts: 200_000, pairs: 100_000, models: 1_000, checkpoints: 10_000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = {attack.__name__: attack for attack in ATTACKS}
    parser.add_argument("--only", choices=names)
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for attack in [names[args.only]] if args.only else ATTACKS:
        count, found, started = args.count or ATTACKS[attack], Counter(), time.time()
        with tempfile.TemporaryDirectory() as folder:
            for number, outcome in enumerate(attack(Path(folder), random.Random(args.seed)), 1):
                if outcome not in ("read", "refused") and found["escaped"] < 20:
                    print(f"{attack.__name__} {number}: {outcome[:300]}", flush=True)
                found[outcome if outcome in ("read", "refused") else "escaped"] += 1
                if number == count:
                    break
        failed += found["escaped"]
        print(f"{attack.__name__}: {count:,} tried, {found['read']:,} read, {found['refused']:,} "
              f"refused, {found['escaped']} escaped, {time.time() - started:.0f} s", flush=True)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
