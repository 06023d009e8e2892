"""What fits where: the memory of a training step, computed from the shapes of a model.

    python bench/memory.py                 # Qwen3-VL-8B; prints the table of docs/scale.md

`cpu_memory` computes that of a command on a CPU, for bench/real_size.py, which measures it.

Counted, in bytes, for each GPU:

    weights        2 a frozen one (bf16), 0.516 in 4 bits (NF4: 4 bits, and 8 + 32/256 bits a block of 64),
                   4 one that trains
    moments        8, of AdamW (2 with adamw8bit)
    gradients      4, during the update
    reference      2 a weight for a copy of the policy (stage 2, full fine-tuning)
    gathered       2 a weight where a sharded model is whole for thinking
    activations    of a pair's two rows, with gradient checkpointing: the input of each layer, and of what is
                   in one forward (DeScore.max_tokens) one layer recomputed, the copies of a prompt's
                   keys and values that its CoTs attend to, and their gradients, and the CoTs' mask; or, if
                   it is more, the logits of one chunk and their gradient in float32; of a sharded model
                   also 2 a weight of the embeddings, which stay gathered
    cache          keys and values of a pair's prompts and rollouts

What is not counted: CUDA's own (about 1 GB), the allocator's gaps, the batch's pixels.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import LOGITS_CHUNK
from rl import Args

GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A Qwen3-VL, by the numbers of its config.json."""

    hidden: int = 4096
    layers: int = 36
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    mlp: int = 12288
    vocabulary: int = 151936
    tied: bool = False  # whether lm_head is the embedding
    depth: int = 27  # of the vision tower
    vision_hidden: int = 1152
    vision_heads: int = 16
    vision_mlp: int = 4304
    deepstack: tuple[int, ...] = (8, 16, 24)
    vision: int = 576_388_336  # its vision tower and mergers, in parameters
    mergers: int = 160_496_896  # of these

    @property
    def linear(self) -> int:
        """Parameters of the language model's linear layers, which LoRA adapts and 4 bits shrink."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def embeddings(self) -> int:
        return (1 if self.tied else 2) * self.vocabulary * self.hidden

    @property
    def total(self) -> int:
        """All parameters, but for the norms of the language model."""
        return self.linear + self.embeddings + self.vision

    @property
    def of_layer(self) -> int:
        """Numbers that a layer keeps of each token for its backward."""
        return (6 * self.hidden + (self.heads + 2 * self.kv_heads) * self.head_size
                + 4 * self.mlp)

    @property
    def of_cache(self) -> int:
        """Numbers that a cache has of each token."""
        return 2 * self.layers * self.kv_heads * self.head_size

    def lora(self, rank: int) -> int:
        wide, narrow, h = self.heads * self.head_size, self.kv_heads * self.head_size, self.hidden
        sums = (h + wide) + 2 * (h + narrow) + (wide + h) + 3 * (h + self.mlp)
        return self.layers * rank * sums


OF_2B = Shape(2048, 28, 16, 8, 128, 6144, 151936, True, 24, 1024, 16, 4096, (5, 11, 17), 406_957_056,
              100_714_496)
OF_4B = Shape(2560, 36, 32, 8, 128, 9728, 151936, True, 24, 1024, 16, 4096, (5, 11, 17), 415_347_712,
              109_105_152)
SHAPES = {"2b": OF_2B, "2b-4": replace(OF_2B, layers=4), "4b": OF_4B, "8b": Shape()}


def step_memory(shape: Shape, prompt: int, cot: int, group: int, mode: str, gpus: int, stage: int,
                eight_bit: bool, rank: int = 64) -> dict[str, float]:
    """GB a GPU by what takes them, with one pair at a time: stage 1 with --max-tokens 1, stage 2 with
    --think-tokens 1 --max-new-tokens COT."""
    total = shape.total
    parts = {}
    if mode == "full":
        trains = shape.linear + shape.embeddings
        parts["weights"] = (4 * trains + 2 * shape.vision) / gpus
        if stage == 2:
            parts["reference"] = 2 * total / gpus
            parts["gathered"] = 2 * 2 * total if gpus > 1 else 0.0
    else:
        trains = shape.lora(rank)
        frozen = shape.linear * (0.516 if mode == "4bit" else 2) + 2 * (shape.embeddings + shape.vision)
        parts["weights"] = frozen + 4 * trains * (2 if stage == 2 else 1)  # and the reference's adapter
    parts["moments"] = (2 if eight_bit else 8) * trains / gpus
    parts["gradients"] = 4 * trains / gpus
    length = prompt + (group * cot if stage == 2 else cot)
    at_once = 2 if mode == "full" or 2 * length <= Args.max_tokens else 1  # of the pair's two rows
    layer = 2 * length * shape.of_layer
    copies = 2 * 2 * group * shape.kv_heads * shape.head_size * (prompt + cot) if stage == 2 else 0
    # The mask of a kv head's heads: bool, and as what is added to the scores.
    masks = 3 * group * shape.heads // shape.kv_heads * cot * (prompt + cot) if stage == 2 else 0
    logits = 4 * LOGITS_CHUNK * shape.vocabulary if stage == 2 else 0
    parts["activations"] = (2 * shape.layers * length * shape.hidden * 2
                            + max(at_once * (3 * layer + 2 * copies + masks), 2 * logits))
    if mode == "full" and gpus > 1:  # what is in no layer stays gathered
        parts["activations"] += 2 * shape.embeddings
    if stage == 2:
        parts["cache"] = 2 * 2 * length * shape.of_cache
    return {name: size / GB for name, size in parts.items()}


def peak(parts: dict[str, float]) -> float:
    """Thinking (gathered weights, cache), the update (gradients, activations and, in a first step, the
    making of moments) and the saving of a checkpoint take turns."""
    steady = sum(parts.get(name, 0) for name in ("imports", "weights", "reference", "moments"))
    thinking = parts.get("gathered", 0) + parts.get("cache", 0)
    new = parts.get("new moments", 0)
    update = parts["gradients"] + max(parts["activations"], new)
    return steady + max(thinking, update, new + parts.get("saved", 0))


IMPORTS = 0.45  # GB that a process of ours holds before it loads a model


def cpu_memory(shape: Shape, kind: str, trains: str, command: str, prompt: int, cot: int, group: int,
               rank: int = 64) -> dict[str, float]:
    """GB of a command on a CPU by what takes them, without mapped files.

    kind: of the frozen weights, "float32", "bfloat16" or "4bit"; trains: "lora", or "whole" or "shards"
    (of two ranks, together); command: "coldstart" or "rl", one step with one pair, whose moments come
    when its activations have gone; "resume", a later step of stage 1; or one that trains nothing.
    prompt, cot: tokens; group: CoTs a video, in stage 2."""
    width = 2 if kind == "bfloat16" else 4
    linear = shape.linear * (0.516 if kind == "4bit" else width)
    parts = {"imports": IMPORTS * (2 if trains == "shards" else 1)}
    parts["weights"] = linear + width * (shape.embeddings + shape.vision)
    stage = {"coldstart": 1, "resume": 1, "rl": 2}.get(command, 0)
    trained = 0
    if trains == "lora":
        adapter = shape.lora(rank) if stage or command != "load" else 0
        mergers = shape.mergers if stage == 1 else 0
        trained = adapter + mergers
        parts["weights"] += 4 * adapter + (4 - width) * mergers
        parts["reference"] = 4 * adapter if stage == 2 else 0
    elif stage:
        trained = shape.linear + shape.embeddings + (shape.mergers if stage == 1 else 0)
        parts["weights"] += (4 - width) * trained
        parts["reference"] = width * (trained if trains == "whole" else shape.total) if stage == 2 else 0
    # What is saved in the type that is wanted stays a mapped file: all of it, or until it changes. Stage 1
    # saves its mergers in float32.
    is_mapped = {"lora": kind == "bfloat16", "whole": width == 4 and command in ("rl", "infer")}
    if is_mapped.get(trains):
        converted = shape.mergers if width == 2 and command in ("rl", "infer", "serve") else 0
        parts["weights"] = 4 * trained + width * converted
    if trains == "shards":
        # To think, both ranks gather the policy and π_ref; to save, the first gathers what trains and its
        # moments, a tensor after the other, each of which both have for as long as that takes.
        parts["gathered"] = 2 * width * 2 * shape.total if stage == 2 else 0
        parts["saved"] = 12 * trained + 2 * 4 * shape.vocabulary * shape.hidden
    parts["gradients"] = 4 * trained if stage else 0
    parts["moments" if command == "resume" else "new moments"] = 8 * trained if stage else 0
    if command == "load":
        parts["activations"] = 0
        return {name: size if name == "imports" else size / GB for name, size in parts.items()}
    length = prompt + (group * cot if stage == 2 else cot)
    rows = 2 if stage else 1
    layer = width * length * shape.of_layer
    logits = 4 * min(LOGITS_CHUNK, rows * group * cot) * shape.vocabulary if stage == 2 else 0
    parts["activations"] = max(rows * 3 * layer, 3 * logits) if stage else layer
    if stage:
        parts["activations"] += rows * shape.layers * length * shape.hidden * width
    parts["cache"] = 0 if stage == 1 else rows * width * length * shape.of_cache
    return {name: size if name == "imports" else size / GB for name, size in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", type=int, default=5000, help="tokens of a prompt")
    parser.add_argument("--cot", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=8)
    args = parser.parse_args()
    print(f"Qwen3-VL-8B, prompts of {args.prompt} tokens, CoTs of {args.cot}, groups of {args.group_size}; "
          "GB a GPU, computed\n")
    print("| | weights | training | stage 1, in all | stage 2, in all | smallest card: stage 1 | stage 2 |")
    print("| --- | ---: | ---: | ---: | ---: | --- | --- |")
    rows = [("4-bit, LoRA 64, adamw8bit, 1 GPU", "4bit", 1, True),
            ("4-bit, LoRA 64, 1 GPU", "4bit", 1, False),
            ("LoRA 64, 1 GPU", "lora", 1, False), ("full, 8 GPUs", "full", 8, False),
            ("full, 16 GPUs", "full", 16, False)]
    for name, mode, gpus, eight_bit in rows:
        one, two = (step_memory(Shape(), args.prompt, args.cot, args.group_size, mode, gpus, stage, eight_bit)
                    for stage in (1, 2))
        cards = [next((f"{card} GB" for card in (24, 48, 80) if peak(parts) * 1.1 + 1 < card), "none")
                 for parts in (one, two)]
        training = two["moments"] + two["gradients"]
        print(f"| {name} | {two['weights']:.1f} | {training:.1f} | {peak(one):.1f} | {peak(two):.1f} "
              f"| {cards[0]} | {cards[1]} |")
    print("\nA card counts as large enough with 10 % and 1 GB to spare. Computed from shapes, not measured.")


if __name__ == "__main__":
    main()
