"""What the authors' release of DeScore does otherwise: its checkpoints, and the layout in which it
thinks and scores. (Its rewards and settings: presets/release.py, presets/release.json.)"""

from dataclasses import replace
from pathlib import Path

import torch

from data import Batch, DataError, Sample, error_context, open_video, read_video

HEADS = ("rm_head.weight", "base_model.model.rm_head.weight", "weight")  # names in rm_head.pth
SCORING_VIDEO = {"min_pixels": 3136, "max_pixels": 200_704}  # thinking is at qwen-vl-utils' defaults


REPETITION_PENALTY = 1.05  # of its greedy thinking


def repetition_penalty(model, temperature: float) -> float:
    """How much a model thinks away from what it has read and said, unless told otherwise: 1, not at
    all, but for one in the release's layout that thinks greedily."""
    is_release = model.info.get("scoring_layout") == "release"
    return REPETITION_PENALTY if is_release and not temperature else 1.0


def head_file(directory: Path) -> Path:
    """Where a release has its rm_head.pth: with the weights, after stage 2 above them."""
    return (directory.parent if directory.name == "huggingface" else directory) / "rm_head.pth"


def load_head(model, path: Path) -> None:
    """Query and head of a checkpoint in the release's layout: the row of the token <Reward>
    in the embedding, and rm_head.pth, of which nothing but tensors is unpickled."""
    # Whatever a hostile or broken file makes the unpickler raise.
    with error_context(f"{path}: holds no head that can be read safely", Exception):
        weights = torch.load(path, map_location="cpu", weights_only=True)
        weights = weights.get("model", weights)  # stage 2 has it one level down
        (head,) = (weights[name] for name in HEADS if name in weights)
        if not head.isfinite().all():
            raise ValueError("values that are not finite")
        model.head.weight.data.copy_(head.reshape(model.head.weight.shape))
    tokenizer = model.processor.tokenizer
    embedding = model.qwen.get_input_embeddings().weight
    token = tokenizer.convert_tokens_to_ids("<Reward>")
    if token in (None, tokenizer.unk_token_id) or token >= len(embedding):
        raise DataError(f"{path.parent}: rm_head.pth is there, but the tokenizer or the "
                        "embedding has no <Reward>")
    model.query.data.copy_(embedding[token])
    model.info = {"scoring_video": SCORING_VIDEO} | model.info | {"scoring_layout": "release"}
    model.has_head = True


def watch(model, keys: list[tuple[str, str]], batch: Batch) -> tuple[Batch, list[list[float]]]:
    """The videos of a batch, encoded as they are seen for scoring, which is at a size of its own
    where info["scoring_video"] gives one; and the seconds of each one's frames."""
    size = model.info.get("scoring_video")
    settings = replace(model.processor.settings, **size or {})
    if size:
        frames = [read_video(video, settings, model.processor.reader) for video, _ in keys]
        samples = [model.processor.sample(*read, prompt) for read, (_, prompt) in zip(frames, keys)]
        return model.encode(model.processor.collate(samples)), [seconds for _, seconds in frames]
    found = []
    for video, _ in keys:
        with open_video(video, settings) as (_, _, seconds):
            found.append(seconds)
    return batch, found


def score(model, keys: list[tuple[str, str]], watched: tuple[Batch, list[list[float]]],
          cots: list[str | None]) -> torch.Tensor:
    """Score as the release does: the CoT is read again, inside the user's turn, and [Reward]
    follows it there. For models that were trained so; costs a second pass. `watched` is what
    `watch` gives for the keys. Returns scores (B,)."""
    batch, seconds = watched
    samples = []
    for grid, when, (_, prompt), cot in zip(batch.grid.tolist(), seconds, keys, cots):
        ids = model.processor.prompt_ids(tuple(grid), when, prompt, cot or "")
        samples.append(Sample(ids, batch.patches[:0].cpu(), tuple(grid)))
    again = replace(model.processor.collate(samples), features=batch.features)
    return model.score(again, [None] * len(keys))
