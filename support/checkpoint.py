"""Checkpoints of a run: a directory step-N with what trains and the optimiser's state, in whole
tensors, in rank-0.safetensors, and with state.json. Complete or absent; what its files were when
they were written stands in SHA256SUMS (`sha256sum -c SHA256SUMS`)."""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from data import DataError, error_context
from support.files import delete, digest, put_in_place, read_json, remove
from support.ranks import Ranks
from support.shard import shard_like, whole

TENSORS = "rank-0.safetensors"  # the first rank writes it
# What a broken file makes its readers raise.
BROKEN = (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError,
          RuntimeError)


class Checkpoints:
    """The checkpoints in a folder, the newest `keep` of them. The first rank writes and checks them,
    for all; each rank may hold a shard of a tensor, and all take part in saving and restoring."""

    def __init__(self, folder: Path, keep: int, ranks: Ranks):
        self.folder = folder
        self.keep = keep
        self.ranks = ranks

    def attach(self, model, optimizer: Optimizer,
               more: dict[str, dict[str, Tensor]] | None = None) -> None:
        """What is to be saved and restored: what trains, the optimiser's state, and `more` tensors by
        kind and name. Raises DataError if the disk cannot hold `keep` + 1 checkpoints: weights and
        their two moments."""
        self.optimizer = optimizer
        self.tensors = {}  # what is restored in place
        for kind, tensors in {"weight": model.trainable(), **(more or {})}.items():
            self.tensors |= {f"{kind}/{name}": tensor for name, tensor in tensors.items()}
        self.optimized = [p for group in optimizer.param_groups for p in group["params"]]
        moments = 2 * sum(p.numel() * p.element_size() for p in self.optimized)
        stored = sum(t.numel() * t.element_size() for t in self.tensors.values())
        size = (stored + moments) * (self.keep + 1)
        free = shutil.disk_usage(self.folder).free if self.ranks.first else size
        if free < size:
            raise DataError(f"{self.folder}: {free / 1e9:.1f} GB are free, the checkpoints "
                            f"need about {size / 1e9:.1f} GB")

    def paths(self) -> list[Path]:
        """The checkpoints, oldest first."""
        paths = [path for path in self.folder.glob("step-*") if path.name[5:].isdecimal()]
        return sorted(paths, key=step_of)

    def save(self, step: int, state: dict) -> None:
        """Write a checkpoint; drop the oldest beyond `keep`. `state`, that of the first rank, goes into
        state.json. Raises DataError on all ranks if it cannot be written."""
        tensors = dict(self.tensors)
        numbers = {}
        for i, parameter in enumerate(self.optimized):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{i}/{key}"] = value
                elif isinstance(value, (int, float)):
                    numbers[f"{i}/{key}"] = value
        places = set()
        for name, tensor in tensors.items():
            gathered = whole(tensor.detach())
            if self.ranks.first:
                tensors[name] = gathered.cpu().contiguous()  # on a CPU no copy
                if tensors[name].data_ptr() in places:  # 8-bit moments share their maps; a file may not
                    tensors[name] = tensors[name].clone()
                places.add(tensors[name].data_ptr())
        state = {"step": step, "ranks": None, "optimizer": numbers} | state
        self.ranks.ask_first(lambda: self.write(self.folder / f"step-{step}", tensors, state))

    def write(self, place: Path, tensors: dict[str, Tensor], state: dict) -> None:
        """Write a checkpoint beside its place, then rename it."""
        beside = place.with_name(place.name + ".partial")
        try:
            delete(beside)
            beside.mkdir()
            save_file(tensors, beside / TENSORS)
            text = json.dumps(state, indent=1) + "\n"
            (beside / "state.json").write_text(text, encoding="utf-8")
            sums = sum_of(beside / TENSORS) + sum_of(beside / "state.json")
            (beside / "SHA256SUMS").write_text(sums, encoding="utf-8")
            put_in_place(beside, place)
            before = [path for path in self.paths() if step_of(path) <= state["step"]]
            for old in before[: -max(self.keep, 1)]:
                remove(old)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise DataError(f"{place}: could not be written ({error}); earlier checkpoints "
                            "are as they were") from error

    @torch.no_grad()
    def newest(self, settings: dict) -> dict | None:
        """Restore the newest whole checkpoint; returns its state.json, None if there is no checkpoint.
        Raises DataError on all ranks if it was made with other settings, or none can be used."""
        newest = self.ranks.ask_first(lambda: self.look(settings))
        if newest is None:
            return None
        path, state = newest
        with error_context(f"{path}: rank {self.ranks.rank} cannot read it", *BROKEN):
            weights, moments = self.read(path, state["optimizer"])
        for name, tensor in self.tensors.items():
            tensor.copy_(weights[name])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        return state

    def look(self, settings: dict) -> tuple[Path, dict] | None:
        """The newest whole checkpoint and its state.json, None if there is no checkpoint."""
        paths = self.paths()
        for path in reversed(paths):
            try:
                check(path / "state.json")
                state = read_json(path / "state.json")
                if state["step"] != step_of(path):
                    raise ValueError(f"it was made after step {state['step']}")
                differences = compare(state, settings)
                if not differences:
                    check(path / TENSORS)
                    self.read(path, state["optimizer"])
            except BROKEN as error:
                print(f"warning: {path}: passed over, it is broken ({error})", file=sys.stderr)
                continue
            if differences:
                raise DataError(f"{path}: made with other settings ({'; '.join(differences)}). "
                                "Give another --out, or --resume false to start anew")
            return path, state
        if paths:
            raise DataError(f"{self.folder}: no checkpoint can be used; --resume false begins anew")
        return None

    def read(self, path: Path, numbers: dict[str, float]) -> tuple[dict, dict]:
        """Weights by name, and the optimiser's state by the places of its parameters, `numbers` of it
        included; of what is sharded, this rank's shards. Raises what is in `BROKEN` where they do not
        fit what was attached."""
        stored = load_file(path / TENSORS)  # mapped into memory: read where it is used
        weights = {}
        for name, tensor in self.tensors.items():
            if name not in stored:
                raise ValueError(f"it was made without {name}, which this run keeps")
            weights[name] = shard_like(stored[name], tensor)
            if weights[name].shape != tensor.shape or weights[name].dtype != tensor.dtype:
                raise ValueError(f"{name.removeprefix('weight/')} has another shape or type than "
                                 "the model's")
        stored |= {f"optimizer/{name}": number for name, number in numbers.items()}
        moments = {}
        for name, value in stored.items():
            if name.startswith("optimizer/"):
                _, i, key = name.split("/")
                value = shard_like(value, self.optimized[int(i)])
                moments.setdefault(int(i), {})[key] = value
        return weights, moments


def compare(state: dict, settings: dict) -> list[str]:
    """How the settings differ from those a checkpoint with this state.json was made with."""
    differences = []
    for key, value in settings.items():
        was = state["args"].get(key)
        if was != value:
            differences.append(f"--{key.replace('_', '-')} was {was}, is {value}")
    if state["ranks"] is not None:  # as once with --shard full
        differences.append(f"each of {state['ranks']} ranks wrote its shards, now one writes all")
    return differences


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def sum_of(path: Path) -> str:
    """A file's line in SHA256SUMS."""
    return f"{digest(path)}  {path.name}\n"


def check(path: Path) -> None:
    """Raises ValueError unless a file is what SHA256SUMS beside it says, OSError where one is
    missing."""
    if sum_of(path) not in (path.parent / "SHA256SUMS").read_text(encoding="utf-8"):
        raise ValueError(f"{path.name} is not as it was written")
