"""What the authors' release of DeScore does otherwise: its checkpoints, the layout in which it
scores, and its rewards, which support/release.json chooses (`--preset`)."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from data import Batch, DataError, Processor, read_text


def load_head(model, path: Path) -> None:
    """Query and head of a checkpoint in the release's layout: the row of the token <Reward>
    in the embedding, and rm_head.pth, of which nothing but tensors is unpickled."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        head = weights.get("rm_head.weight", weights.get("weight"))
        model.head.weight.data.copy_(head.reshape(model.head.weight.shape))
    except Exception as error:  # whatever a hostile or broken file makes the unpickler raise
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: holds no head that can be read safely ({reason})") from error
    tokenizer = model.processor.tokenizer
    embedding = model.qwen.get_input_embeddings().weight
    token = tokenizer.convert_tokens_to_ids("<Reward>")
    if token in (None, tokenizer.unk_token_id) or token >= len(embedding):
        raise DataError(f"{path.parent}: rm_head.pth is there, but the tokenizer or the "
                        "embedding has no <Reward>")
    model.query.data.copy_(embedding[token])
    model.info["scoring_layout"] = "release"


def use_instruction(model, given: str) -> None:
    """Let a model ask with another instruction, such as the one that it was trained on: a text
    file's, or with "problem" what each prompt of a pair file brings itself."""
    text = None if given == "problem" else read_text(Path(given))
    old = model.processor
    model.processor = Processor(old.tokenizer, old.settings, text, old.dimensions)


def score(model, keys: list[tuple[str, str]], batch: Batch,
          cots: list[str | None]) -> torch.Tensor:
    """Score as the release does: the CoT is read again, inside the user's turn, and [Reward]
    follows it there. For models that were trained so; costs a second pass. `batch` holds the
    same videos, encoded. Returns scores (B,)."""
    samples = []
    for (video, prompt), cot in zip(keys, cots):
        samples.append(model.processor.outline(video, prompt, cot or ""))
    again = replace(model.processor.collate(samples), features=batch.features)
    return model.score(again, [None] * len(keys))


def format_reward(text: str, n_tokens: int, gold: dict) -> float:
    """R_f as in the released code: 1 if any JSON with dimensional_scores can be read."""
    answer = text.partition("<answer>")[2].partition("</answer>")[0] or text
    try:
        found = json.loads(answer[answer.index("{") : answer.rindex("}") + 1])
    except (ValueError, RecursionError):
        return 0.0
    return float(isinstance(found, dict) and "dimensional_scores" in found)


def length_reward(text: str, n_tokens: int, gold: dict) -> float:
    """R_l as in the released code: by the characters of the text, in steps."""
    steps = {500: 0.0, 1000: 0.2, 1500: 0.4, 2000: 0.6}
    return next((reward for below, reward in steps.items() if len(text) < below), 1.0)
