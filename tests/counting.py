"""Count what goes through a model: rows and their widths, thoughts, logits, patches, what a backward computes
again. For the tests of budgets and of gradient checkpointing.

    python tests/counting.py COUNTED.jsonl MODULE ARGUMENTS…    # runs a command of the project, and counts
"""

import importlib
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl

from model import DeScore


@contextmanager
def counted(note):
    """Within it `note` gets a record of each of these, in their order:

    forward   rows that the language model gets without a cache, their width, whether with gradients
    thoughts  what is thought about together: videos, the widest prompt, CoTs a video and the longest CoT
    logits    for how many tokens there are logits at one time
    tower     how many patches the vision tower gets
    backward  how many layers of the language model and of the tower it has computed again"""
    again = None  # layers by kind, while a backward is at work

    def wrap(cls, name, before):
        plain = getattr(cls, name)

        def watched(self, *args, **kwargs):
            before(self, *args, **kwargs)
            return plain(self, *args, **kwargs)

        return patch.object(cls, name, watched)

    def forward(self, *args, inputs_embeds, past_key_values=None, **kwargs):
        rows, width, _ = inputs_embeds.shape
        if past_key_values is None:
            note({"what": "forward", "rows": rows, "width": width, "grad": torch.is_grad_enabled()})

    def think(self, batch, n=1, max_new_tokens=4096, *args, **kwargs):
        videos, prompt = batch.input_ids.shape
        note({"what": "thoughts", "videos": videos, "prompt": prompt, "n": n, "longest": max_new_tokens})

    def logits(self, hidden):
        note({"what": "logits", "tokens": hidden.shape[:-1].numel()})

    def tower(self, patches, *args, **kwargs):
        note({"what": "tower", "patches": len(patches)})

    def layer_of(kind):
        def layer(self, *args, **kwargs):
            if again is not None:
                again[kind] += 1

        return layer

    def backward(self, *args, **kwargs):
        nonlocal again
        again = {"language": 0, "tower": 0}
        plain_backward(self, *args, **kwargs)
        note({"what": "backward", **again})
        again = None

    plain_backward = torch.Tensor.backward
    # A layer has one MLP. Whoever wrapped the layer itself would take its checkpointing off.
    with (wrap(qwen3_vl.Qwen3VLTextModel, "forward", forward),
          wrap(qwen3_vl.Qwen3VLVisionModel, "forward", tower),
          wrap(qwen3_vl.Qwen3VLTextMLP, "forward", layer_of("language")),
          wrap(qwen3_vl.Qwen3VLVisionMLP, "forward", layer_of("tower")),
          wrap(DeScore, "think", think),
          wrap(DeScore, "logits", logits),
          patch.object(torch.Tensor, "backward", backward)):
        yield


def main() -> None:
    file, module = sys.argv[1:3]
    del sys.argv[1:3]
    with Path(file).open("a", buffering=1) as lines, counted(lambda one: lines.write(json.dumps(one) + "\n")):
        importlib.import_module(module).main()


if __name__ == "__main__":
    main()
