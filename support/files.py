"""Files and folders that are complete or absent, and what hub ids stand for."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import IO

from huggingface_hub import snapshot_download

from data import TAGS, DataError, error_context, is_number, no_duplicates


def read_json(path: Path) -> dict:
    """A JSON object. Raises DataError, naming the file, if it holds anything else."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with error_context(f"{path}: not JSON", ValueError, RecursionError):
        record = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=no_duplicates)
    if not isinstance(record, dict):
        raise DataError(f"{path}: not a JSON object")
    return record


def read_lines(path: Path) -> list[dict]:
    """The JSON objects of a file to which lines may just be added: a last line that has not ended
    yet is left out, and a file that is not there yet has none. Raises DataError, naming the row, for
    a line that is anything else."""
    content = path.read_bytes() if path.is_file() else b""
    *lines, _ = content.split(b"\n")
    records = []
    for row, line in enumerate(lines, 1):
        with error_context(f"{path}, row {row}: not JSON", ValueError, RecursionError):
            records.append(json.loads(line))
        if not isinstance(records[-1], dict):
            raise DataError(f"{path}, row {row}: not a JSON object")
    return records


# What descore.json says, by type; anything else in it is kept as it is.
KINDS = {"backbone": str, "backbone_sha256": str, "video": dict, "instruction": (str, type(None)),
         "dimensions": dict, "tags": list, "files": dict, "score_quantiles": list,
         "scoring_layout": str, "scoring_video": dict, "args": dict, "note": str}

LAYOUTS = ("ours", "release")  # in which a model scores


def read_info(directory: Path) -> dict:
    """descore.json of a directory, {} for a bare backbone. Raises DataError if it is neither
    a saved DeScore nor a backbone, or what it says is of the wrong type."""
    path = directory / "descore.json"
    own = directory / "descore.safetensors"
    if own.is_file() and not path.is_file():
        raise DataError(f"{path}: no such file, and it says how {own.name} is to be used")
    if not path.is_file() and not (directory / "config.json").is_file():
        raise DataError(f"{directory}: neither descore.json (a saved DeScore) nor config.json (a "
                        "Qwen3-VL, or with rm_head.pth a release of DeScore) is in it")
    info = read_json(path) if path.is_file() else {}
    for key, kind in KINDS.items():
        if key in info and not isinstance(info[key], kind):
            raise DataError(f"{path}: {key!r} is {info[key]!r}")
        if "files" in info and key in ("video", "instruction", "dimensions") and key not in info:
            raise DataError(f"{path}: {key!r} is missing")
    scale = [info[key] for key in ("score_mean", "score_std") if key in info]
    if len(scale) == 1 or not all(is_number(part) and math.isfinite(part) for part in scale):
        raise DataError(f"{path}: score_mean and score_std are not two numbers")
    if scale and scale[1] < 0:
        raise DataError(f"{path}: score_std is {scale[1]}")
    longest = info.get("args", {}).get("max_new_tokens", 1)
    if not isinstance(longest, int) or longest < 1:
        raise DataError(f"{path}: max_new_tokens is {longest!r}")
    if info.get("scoring_layout", "ours") not in LAYOUTS:
        raise DataError(f"{path}: scoring_layout is {info['scoring_layout']!r}, not ours or release")
    tags = info.get("tags", TAGS)
    names = [tag for tag in tags if isinstance(tag, str) and tag.isidentifier()]
    if len(set(names)) != 2 or len(tags) != 2:
        raise DataError(f"{path}: 'tags' is {tags!r}, not the names of two tags")
    weights = info.get("dimensions", {"any": 1}).values()
    if not weights or not all(is_number(weight) and 0 < weight < math.inf for weight in weights):
        raise DataError(f"{path}: 'dimensions' is {info['dimensions']!r}, not names with weights")
    return info


def local_folder(source: str | Path, told: str = "") -> Path:
    """The directory that a directory or a hub id stands for: a hub id for its snapshot, a run's
    folder for the model that it ended with, and `actor` of the authors' stage 2 for what its
    shards were merged to. Raises DataError, which begins with what is `told`, where there is none."""
    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*rm_head.pth"]
    reason = f"{told}{source}: no such directory, and no hub id that can be loaded"
    with error_context(reason, OSError, ValueError):
        directory = Path(source)
        if not directory.is_dir():
            directory = Path(snapshot_download(str(source), allow_patterns=wanted))
        for inside, file in (("model", "descore.json"), ("huggingface", "config.json")):
            if (directory / inside / file).is_file():
                return directory / inside
    return directory


def head_file(directory: Path) -> Path:
    """Where a release of the authors has its rm_head.pth: with the weights, after stage 2 above them."""
    return (directory.parent if directory.name == "huggingface" else directory) / "rm_head.pth"


LEFT_BEHIND = ("runs/rl", "runs/coldstart", "runs/demo/rl", "runs/demo/coldstart")
MODELS = ", else ".join(LEFT_BEHIND)  # for the help of commands
TOY = Path(__file__).resolve().parent.parent / "toy/trained"  # the embedded model (toy/train.py)


def default_model(or_toy=False) -> str:
    """What the stages left behind: the model of stage 2, or else that of stage 1, or else the demo's;
    where there is none, `or_toy`, the embedded model. Raises DataError where that is not there either."""
    for run in LEFT_BEHIND:
        if Path(run, "model").is_dir():
            return run
    if or_toy and TOY.is_dir():
        return str(TOY)
    raise DataError("no model in runs/: run `torchrun coldstart.py` and `torchrun rl.py` "
                    "first, or pass --model")


def digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def put_in_place(beside: Path, place: Path) -> None:
    """Rename a directory that was written beside its place into it, its content safe on the
    disk first. What was there before is kept as `place`.replaced until the new one is: whenever
    this is cut off, `settle` finds a complete one."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in [*beside.rglob("*"), beside]:
        if path.is_file():  # safetensors makes files that nobody else can read
            with contextlib.suppress(OSError):  # some file systems know no permissions
                path.chmod(0o666 & ~mask)
        sync(path)
    replaced = place.with_name(place.name + ".replaced")
    if place.exists():
        delete(replaced)
        place.rename(replaced)
    beside.rename(place)
    sync(place.parent)
    delete(replaced)


def remove(directory: Path) -> None:
    """Delete a directory such that it is never there by half under its own name."""
    if directory.is_dir():
        removed = directory.with_name(directory.name + ".removed")
        delete(removed)
        directory.rename(removed)
        delete(removed)


def settle(place: Path) -> None:
    """Clear up what a kill has left beside a place, of `put_in_place`, `remove` or the writing."""
    replaced, *others = (place.with_name(f"{place.name}.{end}")
                         for end in ("replaced", "removed", "partial"))
    if replaced.exists() and not place.exists():
        replaced.rename(place)
    for left in (replaced, *others):
        delete(left)


def delete(path: Path) -> None:
    """Delete a directory with all that is in it, a file or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Returns when a file's content, or a directory's names, are safe on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def lock(file: IO, taken: str, kind: str = "flock") -> None:
    """Keep others out of an open file until it is closed or this process dies. kind: "flock", or
    "lockf", which forked processes do not hold too. Raises DataError, saying `taken`, where another
    has it. Where there are no locks, as on some file systems, that is said, and the work goes on."""
    try:
        import fcntl  # Windows has none

        getattr(fcntl, kind)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:
        if getattr(error, "errno", None) in (errno.EAGAIN, errno.EACCES):
            raise DataError(taken) from error
        print(f"warning: {file.name}: cannot be locked ({error}), so let no other command write there",
              file=sys.stderr)


def amend(path: Path, **more) -> None:
    """Add entries to the JSON object in a file."""
    write_whole(path, json.dumps(read_json(path) | more, indent=1, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str, ending: str = "partial") -> None:
    """Write a file that at every moment holds the old text or the new: beside its place, under its
    name with this `ending`, then renamed. Several processes that may write the same file need each
    an ending of its own. What is no Unicode is escaped. Raises OSError if it cannot be written."""
    beside = path.with_name(f"{path.name}.{ending}")
    try:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)
