"""A command as it is, and a note of what it asks of the model and how it learns.

    python tests/spied.py NOTES.json rl.py --steps 1 …

Rollouts of rl.py recite (tests/recited.py). NOTES.json has a list for each kind of call."""

import json
import os
import runpy
import sys
from collections import Counter

import recited
import torch
from torch.distributed.tensor import DTensor

import data
import support.batches
import support.optimize
from model import DeScore

NOTES = {"loaded": [], "opened": [], "seen": [], "thought": [], "scored": [], "grouped": [], "loaders": [],
         "optimizers": [], "recomputed": 0}


def watch(owner, name, note):
    """Let `note` see each call, before it is made, and what it returns."""
    real = getattr(owner, name)

    def watched(*args, **kwargs):
        found = real(*args, **kwargs)
        note(found, *args, **kwargs)
        return found

    setattr(owner, name, watched)


def rows_of(batch):
    """The video and the prompt of each row, and the prompt's tokens."""
    lengths = batch.mask.sum(1).tolist()
    return [[str(video), prompt, length] for (video, prompt), length in zip(batch.sources, lengths)]


def note_load(model, *args, **kwargs):
    kinds = [type(part) for part in model.qwen.model.language_model.layers.modules()]
    layers = Counter(f"{kind.__module__.split('.')[0]} {kind.__name__}" for kind in kinds)
    NOTES["loaded"].append({"model": str(args[0]), "layers": layers})


def note_seen(encoded, model, batch):
    if encoded is not batch:
        first = batch.input_ids[0][batch.mask[0]]
        NOTES["seen"].append({"grid": batch.grid.tolist(), "text": model.processor.tokenizer.decode(first)})


def note_thought(thoughts, model, batch, n=1, max_new_tokens=4096, temperature=1.0, top_p=1.0, seeds=None,
                 without_cot=False, repetition_penalty=None):
    NOTES["thought"].append({
        "rows": rows_of(batch), "n": n, "temperature": temperature, "seeds": seeds,
        "repetition_penalty": repetition_penalty,
        "tokens": thoughts.mask.sum(-1).tolist(), "scores": thoughts.scores.tolist()})


def note_scored(scores, model, batch, cots):
    NOTES["scored"].append({"rows": rows_of(batch), "scores": scores.tolist()})


def note_grouped(found, model, batch, tokens, mask, temperature=1.0):
    NOTES["grouped"].append({"rows": rows_of(batch)})


def note_optimizer(optimizer, *args, **kwargs):
    wholes, here = 0, 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            wholes += parameter.numel()
            here += (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
    NOTES["optimizers"].append({"kind": type(optimizer).__name__, "parameters": wholes, "here": here})


def note_loader(found, loader, *args, num_workers=0, **kwargs):
    NOTES["loaders"].append(num_workers)


def note_recomputed(part, inputs):
    """What runs forward within a backward is computed again."""
    if "TextAttention" in type(part).__name__ and torch._C._current_graph_task_id() != -1:
        NOTES["recomputed"] += 1


torch.nn.modules.module.register_module_forward_pre_hook(note_recomputed)
watch(data, "open_file", lambda found, path, reader="av": NOTES["opened"].append(reader))
watch(DeScore, "load", note_load)
watch(DeScore, "encode", note_seen)
watch(DeScore, "think", note_thought)
watch(DeScore, "score", note_scored)
watch(DeScore, "group", note_grouped)
watch(support.batches.DataLoader, "__init__", note_loader)
watch(support.optimize, "adamw", note_optimizer)

if __name__ == "__main__":
    notes, *sys.argv = sys.argv[1:]
    notes += os.environ.get("RANK", "").replace("0", "")  # a file for each rank
    if sys.argv[0] == "rl.py":
        recited.install()
    try:
        if sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        with open(notes, "w") as file:
            json.dump(NOTES, file)
