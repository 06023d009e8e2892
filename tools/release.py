"""What the authors' release of DeScore does otherwise: its checkpoints, and the layout in which it
scores. (Its rewards and settings: presets/release.py, presets/release.json.)

The release reads a CoT again, inside the user's turn, and [Reward] follows it there. That is a
second pass. `DeScore.load` gives a model of this kind for a checkpoint of the release, for a saved
model whose descore.json says so, and where it is asked for the layout "release".
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from data import (
    Batch,
    DataError,
    Sample,
    VideoSettings,
    error_context,
    open_video,
    read_video,
)
from model import DeScore, Thoughts

HEADS = ("rm_head.weight", "base_model.model.rm_head.weight", "weight")  # names in rm_head.pth
SCORING_VIDEO = {"min_pixels": 3136, "max_pixels": 200_704}  # thinking is at qwen-vl-utils' defaults
REPETITION_PENALTY = 1.05  # of its greedy thinking


@dataclass
class Watched(Batch):
    """A batch as its videos are seen for scoring, encoded."""

    seconds: list[list[float]] | None = None  # of the frames of each row

    def select(self, rows: list[int]) -> "Watched":
        return replace(super().select(rows), seconds=[self.seconds[row] for row in rows])


class Release(DeScore):
    """A model that thinks as ours does, and scores in the release's layout. Its batches have to
    say their sources. An engine that is to think for it stands for `DeScore.think`, which this
    `think` calls; what stands for this one has to score by the second pass itself."""

    def own_penalty(self, temperature: float) -> float:
        return 1.0 if temperature else REPETITION_PENALTY

    @property
    def scoring_settings(self) -> VideoSettings:
        return replace(self.processor.settings, **self.info.get("scoring_video") or {})

    def watch(self, batch: Batch) -> Watched:
        """The videos of a batch as they are seen for scoring: read again if info["scoring_video"]
        gives that a size of its own."""
        batch = self.encode(batch)
        if batch.sources is None:
            raise DataError("the release's layout reads each video again, and the batch does not "
                            "say which they are")
        settings = self.scoring_settings
        if not self.info.get("scoring_video"):
            seconds = []
            for video, _ in batch.sources:
                with open_video(video, settings) as (_, _, shown_at):
                    seconds.append(shown_at)
            return Watched(**vars(batch), seconds=seconds)
        read = [read_video(video, settings, self.processor.reader) for video, _ in batch.sources]
        samples = []
        for (frames, shown_at), (_, prompt) in zip(read, batch.sources):
            samples.append(self.processor.sample(frames, shown_at, prompt))
        seen = self.encode(self.processor.collate(samples))
        seen = replace(seen, sources=batch.sources)
        return Watched(**vars(seen), seconds=[shown_at for _, shown_at in read])

    @torch.no_grad()
    def think(
            self, batch: Batch, n: int = 1, max_new_tokens: int = 4096,
            temperature: float = 1.0, top_p: float = 1.0,
            seeds: list[int] | None = None, without_cot: bool = False,
            repetition_penalty: float | None = None) -> Thoughts:
        """`DeScore.think`, with scores of the second pass."""
        batch = self.encode(batch)
        watched = self.watch(batch)
        thoughts = super().think(batch, n, max_new_tokens, temperature, top_p, seeds,
                                 repetition_penalty=repetition_penalty)
        parts = []
        for nth in range(n):
            cots = []
            for tokens, mask in zip(thoughts.tokens[:, nth], thoughts.mask[:, nth]):
                cots.append(self.processor.decode(tokens[mask]))
            parts.append(self.score_parts(watched, cots))
        parts = torch.stack(parts, 1)  # (B, n, K)
        scores_no_cot = self.score(watched, [None] * len(batch)) if without_cot else None
        return thoughts._replace(scores=self.overall(parts), scores_no_cot=scores_no_cot, parts=parts)

    def score_parts(self, batch: Batch, cots: list[str | None]) -> Tensor:
        """`DeScore.score_parts`, and with it `score`, by the second pass. `batch` may be what `watch`
        made of it."""
        watched = batch if isinstance(batch, Watched) else self.watch(batch)
        samples = []
        rows = zip(watched.grid.tolist(), watched.seconds, watched.sources, cots)
        for grid, seconds, (_, prompt), cot in rows:
            ids = self.processor.prompt_ids(tuple(grid), seconds, prompt, cot or "")
            samples.append(Sample(ids, watched.patches[:0].cpu(), tuple(grid)))
        again = replace(self.processor.collate(samples), features=watched.features)
        return super().score_parts(again, [None] * len(watched))


def in_its_layout(cls: type[DeScore]) -> type[DeScore]:
    """The class of models that score in the release's layout and are else of this class."""
    if cls is DeScore:
        return Release
    return cls if issubclass(cls, Release) else type(cls.__name__, (Release, cls), {})


def load_head(model: DeScore, path: Path) -> None:
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
    model.info = {"scoring_video": SCORING_VIDEO} | model.info
    model.has_head = True
