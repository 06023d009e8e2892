"""What a real vLLM engine writes beside what `DeScore.think` does, as a line of JSON.

    PYTHON tests/engined.py MODEL PAIRS VIDEOS    # PYTHON: of an environment that has vLLM, see docs/scale.md

The first VIDEOS of a pair file are thought about greedily by both, twice: by the adapter as it was saved, and
by one that has been moved. Then two CoTs each are drawn, twice by the same seeds and once by others."""

import json
import os
import sys
from pathlib import Path

for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}.items():
    os.environ.setdefault(name, value)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from data import keys_of, read_pairs
from model import DeScore
from tools.engine import engine_of, think

LONGEST = 140


def compared(model, batch):
    """How many greedy CoTs are token for token ours, and how far apart the figures are at most."""
    ours = model.think(batch, 1, LONGEST, 0.0)
    theirs = think(model, batch, 1, LONGEST, 0.0)
    equal = 0
    for b in range(len(batch)):
        pairs = [(thoughts.tokens[b][thoughts.mask[b]]).tolist() for thoughts in (ours, theirs)]
        equal += pairs[0] == pairs[1]
    found = {"cots": len(batch), "equal": equal, "tokens": int(theirs.mask.sum()),
             "sampler_gap": theirs.sampler_gap.max().item()}
    if equal == len(batch):
        found["logps"] = (ours.logps - theirs.logps).abs().max().item()
        found["scores"] = (ours.scores - theirs.scores).abs().max().item()
    return found


def main():
    source, pairs, count = sys.argv[1:]
    model = DeScore.load(source, device="cpu")
    model.set_trainable(model.backbone.peft_config["default"].r)
    keys = list(dict.fromkeys(keys_of(read_pairs(pairs))))[: int(count)]
    batch = model.processor.collate([model.processor(*key) for key in keys])
    found = {"anew": any("merger" in name for name in model.changed), "saved": compared(model, batch)}
    with torch.no_grad():
        for name, parameter in model.trainable().items():
            if ".lora_" in name:
                parameter.mul_(1.5)
    found["moved"] = compared(model, batch)
    drawn = [think(model, batch, 2, LONGEST, 1.0, 0.9, seeds=[seed] * len(keys)) for seed in (5, 5, 6)]
    same = [torch.equal(drawn[0].tokens, other.tokens) for other in drawn[1:]]
    twins = [torch.equal(a, b) for a, b in drawn[0].tokens]
    found["drawn"] = {"by the same seeds": same[0], "by others": same[1], "twins": sum(twins),
                      "adapters": engine_of(model).adapters}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
