"""Checkpoints of a run: a directory step-N with state.json and rank-R.safetensors, holding what
trains and the optimiser's state, or a rank's shards of both. Complete or absent; what its files
were when they were written stands in SHA256SUMS (`sha256sum -c SHA256SUMS`)."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from data import DataError
from support.files import delete, digest, put_in_place, read_json, remove
from support.ranks import Ranks
from support.shard import local

# What a broken file makes its readers raise.
BROKEN = (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError,
          RuntimeError)


class Different(DataError):
    """A checkpoint of other settings."""


class Checkpoints:
    """The checkpoints in a folder, the newest `keep` of them."""

    def __init__(self, folder: Path, keep: int, ranks: Ranks):
        self.folder, self.keep, self.ranks = folder, keep, ranks

    def attach(self, model, optimizer: torch.optim.Optimizer,
               more: dict[str, dict[str, torch.Tensor]] | None = None) -> None:
        """What is to be saved and restored: what trains, the optimiser's state, and `more` tensors by
        kind and name. Raises DataError if the disk cannot hold `keep` + 1 checkpoints: weights and
        their two moments."""
        self.optimizer, self.device = optimizer, model.device
        self.tensors = {}  # what is restored in place
        for kind, tensors in {"weight": model.trainable(), **(more or {})}.items():
            self.tensors |= {f"{kind}/{name}": tensor for name, tensor in tensors.items()}
        groups = optimizer.param_groups
        self.optimized = [p for group in groups for p in group["params"]]
        weights = sum(p.numel() * p.element_size() for p in self.tensors.values())
        size = 3 * weights * (self.keep + 1)
        free = shutil.disk_usage(self.folder).free if self.ranks.first else size
        if free < size:
            raise DataError(f"{self.folder}: {free / 1e9:.1f} GB are free, the checkpoints "
                            f"need about {size / 1e9:.1f} GB")

    def found(self) -> list[Path]:
        """The checkpoints, oldest first."""
        found = [path for path in self.folder.glob("step-*") if path.name[5:].isdecimal()]
        return sorted(found, key=step_of)

    def newest(self, settings: dict) -> dict | None:
        """Restore the newest checkpoint that every rank finds whole; returns its state.json, None
        if there is no checkpoint. Raises `Different` on all ranks if it was made with other
        settings, DataError if there are some and none can be used."""
        paths = self.ranks.gather(self.found() if self.ranks.first else [])
        for path in reversed(paths):
            errors = []
            try:
                state, weights, moments = self.read(path, settings)
            except Different as error:
                errors = [error]
            except BROKEN as error:
                errors = [DataError(f"{path}: passed over, it is broken ({error})")]
            errors = self.ranks.gather(errors)
            for error in errors:
                if isinstance(error, Different):
                    raise error
            if not errors:
                self.restore(weights, moments)
                return state
            if self.ranks.first:
                print(f"warning: {errors[0]}", file=sys.stderr)
        if paths:
            raise DataError(f"{self.folder}: no checkpoint can be used; --resume false begins anew")
        return None

    def save(self, step: int, state: dict) -> None:
        """Write a checkpoint beside its place, then rename it; drop the oldest beyond
        `keep`. `state` goes into state.json. Raises DataError on all ranks if one cannot write."""
        place = self.folder / f"step-{step}"
        beside = place.with_name(place.name + ".partial")
        with self.together(place, beside):
            if self.ranks.first:
                delete(beside)
                beside.mkdir()
        tensors, numbers = dict(self.tensors), {}
        for i, parameter in enumerate(self.optimized):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer/{i}/{key}"] = value
                elif isinstance(value, (int, float)):
                    numbers[f"{i}/{key}"] = value
        sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
        world, sums = self.ranks.world if sharded else None, []
        with self.together(place, beside):
            if self.ranks.first or sharded:
                mine = {}
                for name, tensor in tensors.items():
                    mine[name] = local(tensor).detach().to("cpu", copy=True).contiguous()
                path = beside / f"rank-{self.ranks.rank}.safetensors"
                save_file(mine, path)
                sums = [sum_of(path)]
        sums = self.ranks.gather(sums)
        with self.together(place, beside):
            if self.ranks.first:
                state = {"step": step, "ranks": world, "optimizer": numbers} | state
                path = beside / "state.json"
                path.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
                sums = "".join([*sums, sum_of(path)])
                (beside / "SHA256SUMS").write_text(sums, encoding="utf-8")
                put_in_place(beside, place)
                before = [path for path in self.found() if step_of(path) <= step]
                for old in before[: -max(self.keep, 1)]:
                    remove(old)

    @contextmanager
    def together(self, place: Path, beside: Path) -> Iterator[None]:
        """Within it a rank may fail to write: then all of them raise DataError."""
        errors = []
        try:
            yield
        except (OSError, SafetensorError) as error:
            errors = [str(error)]
        for error in self.ranks.gather(errors):
            if self.ranks.first:
                shutil.rmtree(beside, ignore_errors=True)
            raise DataError(f"{place}: could not be written ({error}); earlier checkpoints "
                            "are as they were")

    def read(self, path: Path, settings: dict) -> tuple[dict, dict, dict]:
        """A checkpoint's state.json, this rank's weights by name, and the state of the optimiser
        for each of its parameters; raises what is in `BROKEN` unless all are as they were saved."""
        check(path / "state.json")
        state = read_json(path / "state.json")
        if state["step"] != step_of(path):
            raise ValueError(f"it was made after step {state['step']}")
        differences = []
        for key, value in settings.items():
            was = state["args"].get(key)
            if was != value:
                differences.append(f"--{key.replace('_', '-')} was {was}, is {value}")
        if state["ranks"] not in (None, self.ranks.world):
            differences.append(f"sharded over {state['ranks']} processes, now there are "
                               f"{self.ranks.world}")
        if differences:
            raise Different(f"{path}: made with other settings ({'; '.join(differences)}). "
                            "Give another --out, or --resume false to start anew")
        rank = self.ranks.rank if state["ranks"] else 0
        check(path / f"rank-{rank}.safetensors")
        tensors = load_file(path / f"rank-{rank}.safetensors")
        weights, moments = {}, {}
        for name, tensor in self.tensors.items():
            weights[name], like = tensors[name], local(tensor)
            if weights[name].shape != like.shape or weights[name].dtype != like.dtype:
                raise ValueError(f"{name.removeprefix('weight/')} has another shape or type than the model's")
        numbers = {f"optimizer/{name}": value for name, value in state["optimizer"].items()}
        for name, value in [*tensors.items(), *numbers.items()]:
            if name.startswith("optimizer/"):
                _, i, key = name.split("/")
                like = self.optimized[int(i)]
                moments.setdefault(int(i), {})[key] = self.shard_like(value, like)
        return state, weights, moments

    def restore(self, weights: dict, moments: dict) -> None:
        """Put what `read` has found in place."""
        for name, tensor in self.tensors.items():
            local(tensor).data.copy_(weights[name])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def shard_like(self, value, like: torch.Tensor):
        """A rank's shard of a sharded parameter's moment as a sharded tensor again."""
        is_shard = isinstance(like, DTensor) and isinstance(value, torch.Tensor)
        if not is_shard or not value.ndim:
            return value
        return DTensor.from_local(value.to(self.device), like.device_mesh, like.placements,
                                  shape=like.shape, stride=like.stride())


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
