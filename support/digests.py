"""What files, pairs, models and code are, by SHA-256 of their content: two with one digest are the same.

A run keeps the digests of all that it depends on beside its settings, and does not go on with anything
else; an adapter knows its backbone by one."""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from data import DataError, Pair
from support.files import digest, head_file, local_folder, read_json, write_whole

# What is smaller is read again each time, which is as quick as looking up what it was.
REMEMBERED_FROM = 2**26  # bytes
# What a saved model has beside its backbone's weights.
ON_TOP = ("descore.safetensors", "adapter_config.json", "adapter_model.safetensors",
          "lora_adapter/adapter_config.json", "lora_adapter/adapter_model.safetensors")
# Files of the project that may change while a run rests, for they decide nothing that it computes.
ONLY_WRITE = {
    "tools/report.py",  # makes pages of a run's log and of judged videos
    "tools/trackers.py",  # passes figures on to TensorBoard or Weights & Biases
    "tools/client.py",  # asks a served model; a run serves none
    "tools/journal.py",  # keeps judgements of infer.py and tools.annotate; a run keeps none
    "tools/protocol.py",  # says what contradicts itself in a pair file, and changes nothing
    "tools/memory.py",  # holds videos of whoever trains a generator; a run reads files
}
# What no entry, half of one, a folder that nobody may write to, or no home at all make of looking up.
NOTHING_KEPT = (AttributeError, LookupError, OSError, RuntimeError, ValueError)
PAIRS = "the training pairs"


def of_json(value) -> str:
    """SHA-256 of what JSON can hold, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def of_pairs(pairs: list[Pair]) -> str:
    """SHA-256 of pairs as they were read: their rows, videos by name, labels, CoTs and sub-scores."""
    return of_json([asdict(pair) for pair in pairs])


# ------------------------------
# Weights


def of_backbone(source: str | Path) -> str:
    """A fingerprint of a backbone, a directory or hub id: of its config.json and of the files that its
    weights are in. It does not depend on how these are loaded, nor on what else lies beside them."""
    directory = local_folder(source)
    weights = [directory / "model.safetensors"]
    if not weights[0].is_file():
        shards = read_json(directory / "model.safetensors.index.json").get("weight_map")
        if not isinstance(shards, dict):
            raise DataError(f"{directory}: its index of weight files names none")
        weights = [directory / name for name in sorted(set(shards.values()))]
    return of_files(directory, [directory / "config.json", *weights])


def of_model(model, source: str | Path) -> str:
    """A fingerprint of a model as it was loaded from `source`: of its backbone, of the adapter, query
    and head on top of it, and of what it judges and reads."""
    directory = local_folder(source)
    processor = model.processor
    on_top = [directory / name for name in ON_TOP]
    on_top = [path for path in [*on_top, head_file(directory)] if path.is_file()]
    return of_json([
        model.backbone_sha256, of_files(directory, on_top), processor.dimensions, processor.tags,
        processor.opening, processor.tokenizer.backend_tokenizer.to_str()])


def of_files(directory: Path, paths: Iterable[Path]) -> str:
    return of_json({os.path.relpath(path, directory): remembered(path) for path in paths})


def remembered(path: Path) -> str:
    """`files.digest`. That of a large file is kept in the user's cache folder, under its path, and
    holds for as long as the file has the size and the time of its last change that it had."""
    status = path.stat()
    if status.st_size < REMEMBERED_FROM:
        return digest(path)
    about = {"path": str(path.resolve()), "size": status.st_size, "mtime_ns": status.st_mtime_ns,
             "ctime_ns": status.st_ctime_ns}  # which nobody can set
    with contextlib.suppress(*NOTHING_KEPT):
        entry = json.loads(entry_of(about["path"]).read_text(encoding="utf-8"))
        if about.items() <= entry.items():
            return entry["sha256"]
    sha256 = digest(path)
    with contextlib.suppress(*NOTHING_KEPT):
        place = entry_of(about["path"])
        place.parent.mkdir(parents=True, exist_ok=True)
        # Each rank may be writing it just now.
        write_whole(place, json.dumps(about | {"sha256": sha256}), f"{os.getpid()}.partial")
    return sha256


def entry_of(path: str) -> Path:
    """Where a file's digest is kept; the folder is the XDG Base Directory Specification's."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "descore" / f"{of_json(path)}.json"


# ------------------------------
# A run


def of_code(root: Path) -> dict[str, str]:
    """SHA-256 of each file of the project in `root` that is imported by now, by its path there; not of
    tests, nor of what `ONLY_WRITE` names."""
    digest_of = {}
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or os.devnull).resolve()
        if root in path.parents and "site-packages" not in path.parts and path.is_file():
            name = path.relative_to(root).as_posix()
            if name not in ONLY_WRITE and not name.startswith("tests/"):
                digest_of[name] = digest(path)
    return digest_of


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """The names whose digests differ. What stands on one side alone is no difference: it can only
    have come or gone through a change of something else."""
    return sorted(name for name in before.keys() & now.keys() if before[name] != now[name])


def say(names: list[str], step: int) -> str:
    """That these have changed since a step, in words."""
    have = [f"{name} {'have' if name.startswith(PAIRS) else 'has'} changed" for name in names]
    return f"{', '.join(have)} since step {step}"
