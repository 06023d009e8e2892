"""Damage to a saved model's files, one fault at a time, as a bad disk, a bad edit or an enemy makes it."""

import json
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ODD = (None, True, 0, -1, 3, 10**30, 0.5, float("nan"), "", "x", "\ud800", "..", [], [1], [[]], {}, {"x": 1})
FATAL = ("lost", "all lost", "half lost", "renamed", "cut", "reshaped", "not finite", "whole numbers")


def damage(source: Path, folder: Path, rng: random.Random) -> str:
    """Copy a model's directory to `folder`, which is emptied, with one fault in one of its files. Returns
    which, in words, the file's name first. A model in which a tensor is one of FATAL can't be loaded; other
    faults may leave one that can."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")))
    content = path.read_bytes()
    kinds = {"file gone": None, "file cut": content[: rng.randrange(len(content))], "empty": b"",
             "nested": b"[" * 100_000, "other bytes": flipped(content, rng)}
    kind = rng.choice([*kinds, *["inside"] * 10])
    if kind == "file gone":
        path.unlink()
    elif kind in kinds:
        path.write_bytes(kinds[kind])
    else:
        inside = damage_tensors if path.suffix == ".safetensors" else damage_json
        kind = inside(path, rng)
    return f"{path.relative_to(folder)}: {kind}"


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Some bytes at the beginning, where headers stand, or anywhere, made others."""
    content, reach = bytearray(content), rng.choice((16, 2000, 10**12))
    for _ in range(rng.choice((1, 1, 20))):
        content[rng.randrange(min(reach, len(content)))] = rng.randrange(256)
    return bytes(content)


def damage_json(path: Path, rng: random.Random) -> str:
    """One value somewhere inside gone, or another."""
    record = json.loads(path.read_text(encoding="utf-8"))
    places, waiting = [], [record]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        if len(keys) > 50:  # a vocabulary, say
            keys = rng.sample(list(keys), 3)
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                waiting.append(node[key])
    node, key = rng.choice(places)
    if rng.random() < 0.3:
        del node[key]
        kind = f"{key!r} gone"
    else:
        node[key] = rng.choice(ODD)
        kind = f"{key!r} is {node[key]!r}"
    path.write_text(json.dumps(record))
    return kind


def damage_tensors(path: Path, rng: random.Random) -> str:
    """One tensor, or all, not as they were."""
    weights = load_file(path)
    name = rng.choice(sorted(weights))
    kind = rng.choice(FATAL)
    if kind == "half lost":
        weights = {name: weights[name] for name in sorted(weights)[::2]}
    elif kind == "all lost":
        weights = {}
    else:
        tensor = weights.pop(name)
        if kind == "renamed":
            weights[name + "s"] = tensor
        elif kind == "cut":
            weights[name] = tensor[:-1].contiguous()
        elif kind == "reshaped":
            weights[name] = tensor[None].contiguous()
        elif kind == "not finite":
            weights[name] = tensor.clone()
            odd = rng.choice((torch.nan, torch.inf, -torch.inf))
            weights[name].view(-1)[rng.randrange(tensor.numel())] = odd
        elif kind == "whole numbers":
            size = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
            weights[name] = tensor.view(size)
    save_file(weights, path, metadata={"format": "pt"})
    return f"{kind} ({name})"
