"""Checkpoints of a run: a directory step-N with state.json and rank-R.safetensors, holding what
trains and the optimiser's state, or a rank's shards of both. Complete or absent."""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from data import DataError
from support.files import put_in_place, read_json, remove
from support.ranks import Ranks
from support.shard import local

# What a broken file makes its readers raise.
BROKEN = (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError)


class Different(DataError):
    """A checkpoint of other settings."""


class Checkpoints:
    """The checkpoints in a folder, the newest `keep` of them."""

    def __init__(self, folder: Path, keep: int, ranks: Ranks):
        self.folder, self.keep, self.ranks = folder, keep, ranks

    def attach(self, model, optimizer: torch.optim.Optimizer) -> None:
        """What is to be saved and restored. Raises DataError if the disk cannot hold
        `keep` + 1 checkpoints: weights and their two moments."""
        self.optimizer, self.device = optimizer, model.device
        self.parameters = model.trainable()
        groups = optimizer.param_groups
        self.optimized = [p for group in groups for p in group["params"]]
        weights = sum(p.numel() * p.element_size() for p in self.parameters.values())
        size = 3 * weights * (self.keep + 1)
        free = shutil.disk_usage(self.folder).free if self.ranks.first else size
        if free < size:
            raise DataError(f"{self.folder}: {free / 1e9:.1f} GB are free, the checkpoints "
                            f"need about {size / 1e9:.1f} GB")

    def found(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        found = self.folder.glob("step-*[0-9]")
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def newest(self, settings: dict) -> dict | None:
        """Restore the newest checkpoint that is whole; returns its state.json, None if there
        is none. Raises `Different` if it was made with other settings."""
        for path in self.found()[::-1]:
            try:
                return self.load(path, settings)
            except BROKEN as error:
                if isinstance(error, Different):
                    raise
                print(f"warning: {path}: passed over, it is broken ({error})", file=sys.stderr)
        return None

    def save(self, step: int, state: dict) -> None:
        """Write a checkpoint beside its place, then rename it; drop the oldest beyond
        `keep`. `state` goes into state.json."""
        place = self.folder / f"step-{step}"
        beside = place.with_name(place.name + ".partial")
        if self.ranks.first:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
        self.ranks.wait()
        tensors = {f"weight/{name}": p for name, p in self.parameters.items()}
        numbers = {}
        for i, parameter in enumerate(self.optimized):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer/{i}/{key}"] = value
                elif isinstance(value, (int, float)):
                    numbers[f"{i}/{key}"] = value
        sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
        world = self.ranks.world if sharded else None
        try:
            if self.ranks.first or sharded:
                mine = {}
                for name, tensor in tensors.items():
                    mine[name] = local(tensor).detach().to("cpu", copy=True).contiguous()
                save_file(mine, beside / f"rank-{self.ranks.rank}.safetensors")
            self.ranks.wait()
            if self.ranks.first:
                state = {"step": step, "ranks": world, "optimizer": numbers} | state
                text = json.dumps(state, indent=1) + "\n"
                (beside / "state.json").write_text(text, encoding="utf-8")
                put_in_place(beside, place)
                for old in self.found()[: -max(self.keep, 1)]:
                    remove(old)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise DataError(f"{place}: could not be written ({error}); earlier checkpoints "
                            "are as they were") from error

    def load(self, path: Path, settings: dict) -> dict:
        """Put a checkpoint's weights and optimiser state in place."""
        state = read_json(path / "state.json")
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
        tensors = load_file(path / f"rank-{rank}.safetensors")
        weights = {name: tensors[f"weight/{name}"] for name in self.parameters}
        moments = {}
        numbers = {f"optimizer/{name}": value for name, value in state["optimizer"].items()}
        for name, value in [*tensors.items(), *numbers.items()]:
            if name.startswith("optimizer/"):
                _, i, key = name.split("/")
                like = self.optimized[int(i)]
                moments.setdefault(int(i), {})[key] = self.shard_like(value, like)
        for name, parameter in self.parameters.items():  # all are there, or none was used
            local(parameter).data.copy_(weights[name])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        return state

    def shard_like(self, value, like: torch.Tensor):
        """A rank's shard of a sharded parameter's moment as a sharded tensor again."""
        is_shard = isinstance(like, DTensor) and isinstance(value, torch.Tensor)
        if not is_shard or not value.ndim:
            return value
        return DTensor.from_local(value.to(self.device), like.device_mesh, like.placements,
                                  shape=like.shape, stride=like.stride())
