"""DeScore as the trainers of video generators call a reward.

In each, `score` is an `infer.Scorer`, or a `support.client.Client` that asks a served one, and `fps`
how many frames a second the generator makes. A reward is the standardised score, or the score
itself of a model that has no scale. A video that cannot be scored is a ValueError that says why,
for NaN would spoil what a group is compared with; where `unusable` is a number, it is that.

To use them where this project is not, copy this file and client.py side by side. They need Python
3.8 or later, numpy and torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

try:
    from support.client import Client, as_reward
except ImportError:  # a copy in a trainer
    from client import Client, as_reward


def rewards(score, videos, prompts, unusable: float | None = None,
            **how) -> tuple[list[float], list[dict]]:
    """A reward and a record for each video. how: fps, layout."""
    records, found = score(videos, prompts, **how), []
    for place, record in enumerate(records):
        if record["error"] is not None and unusable is None:
            raise ValueError(f"video {place}: {record['error']}")
        found.append(as_reward(record) if record["error"] is None else unusable)
    return found, records


def flow_grpo(score, fps: float, unusable: float | None = None) -> Callable:
    """For flow_grpo: what stands in `multi_score`'s score_functions.

    Returns `descore_score(device)`, which returns f(videos, prompts, metadata) → (rewards, {});
    videos (B, F, 3, H, W) in [0, 1]. The device is the score's own affair."""

    def descore_score(device=None):
        def ask(videos, prompts, metadata=None):
            found, _ = rewards(score, videos, prompts, unusable, fps=fps, layout="TCHW")
            return found, {}

        return ask

    return descore_score


@dataclass
class VideoAlign:
    """For DanceGRPO, and whoever calls VideoAlign's VideoVLMRewardInference: files in, dicts out.

    DeScore gives one number. TA (does it follow the prompt) and Overall are what it means; VQ and
    MQ, of which it knows nothing, are that number too, so that a trainer trains on DeScore whichever
    it reads: DanceGRPO reads VQ and MQ (`--vq_coef 1 --mq_coef 0`). So Overall is no sum here, and a
    sum of them counts one thing several times. DanceGRPO catches whatever is raised and takes −1 for
    it, without a word: where its rewards are all −1, no video was scored."""

    score: Callable
    unusable: float | None = None

    def reward(self, video_paths, prompts, fps=None, num_frames=None, max_pixels=None,
               use_norm: bool = True) -> list[dict[str, float]]:
        """Raises ValueError for fps, num_frames, max_pixels: the model's settings say these."""
        if (fps, num_frames, max_pixels) != (None, None, None):
            raise ValueError("fps, num_frames and max_pixels are in the model's own settings")
        found, records = rewards(self.score, video_paths, prompts, self.unusable)
        if not use_norm:
            found = [one if record["error"] is not None else record["score"]
                     for one, record in zip(found, records)]
        return [dict.fromkeys(("VQ", "MQ", "TA", "Overall"), one) for one in found]


@dataclass
class Rewards:
    """What Flow-Factory reads of an answer."""

    rewards: torch.Tensor  # (B,)
    extra_info: dict


class FlowFactory:
    """For Flow-Factory, in front of its own class:

        class DeScoreReward(FlowFactory, PointwiseRewardModel):
            score, fps = Client("http://127.0.0.1:8000"), 16
    """

    required_fields = ("prompt", "video")
    use_tensor_inputs = True  # frames as they were generated; lists of PIL images do as well
    score, fps, unusable = None, None, None

    def __call__(self, prompt, image=None, video=None, audio=None, condition_images=None,
                 condition_videos=None, **kwargs) -> Rewards:
        """prompt: B texts; video: B of (T, 3, H, W) in [0, 1], or of lists of PIL images."""
        if video is None:
            raise ValueError("DeScore scores videos, and there is none")
        found, records = rewards(self.score, list(video), prompt, self.unusable, fps=self.fps,
                                 layout="TCHW")
        extra = {name: [record[name] for record in records]
                 for name in ("score", "cot", "sub_scores", "error")}
        return Rewards(torch.tensor(found, dtype=torch.float32), extra)


@dataclass
class VideoXFun:
    """For VideoX-Fun's `get_reward`."""

    score: Callable
    fps: float
    unusable: float | None = None

    def get_reward(self, batch_frames: torch.Tensor, batch_prompt: list[str]) -> torch.Tensor:
        """batch_frames: (B, 3, T, H, W) in [0, 1]. Returns (B,); no gradient flows through it."""
        found, _ = rewards(self.score, batch_frames, batch_prompt, self.unusable, fps=self.fps,
                           layout="CTHW")
        return torch.tensor(found, dtype=torch.float32, device=batch_frames.device)


served = lru_cache(maxsize=None)(Client)  # one for each address


async def compute_score_descore(
        data_source, solution_image, ground_truth, extra_info=None, *, score=None,
        server_url: str = "http://127.0.0.1:8000", fps: float | None = None,
        **kwargs) -> dict[str, float]:
    """For verl-omni, of whose settings this file and this name are two; server_url and fps are more
    (`reward_functions.<key>.fps=16`), unless extra_info says fps.

    solution_image: uint8, or float in [0, 1], (T, 3, H, W); ground_truth: the prompt."""
    fps = (extra_info or {}).get("fps") if fps is None else fps
    ask = partial(rewards, score or served(server_url), solution_image, [ground_truth], fps=fps,
                  layout="TCHW")
    (found,), (record,) = await asyncio.get_running_loop().run_in_executor(None, ask)
    return {"score": found, "descore_raw": record["score"]}
