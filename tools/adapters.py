"""DeScore as the trainers of video generators call a reward.

In each, `score` is an `infer.Scorer`, or a `tools.client.Client` that asks a served one, and `fps`
how many frames a second the generator makes. A reward is the standardised score, or the score
itself of a model that has no scale. A video that cannot be scored is a ValueError that says why,
for NaN would spoil what a group is compared with; where `unusable` is a number, it is that.

To use them where this project is not, copy this file and client.py side by side, into a package or
anywhere else. They need Python 3.8 or later, numpy and torch.
"""

from __future__ import annotations

import asyncio
import importlib.util
import math
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch

try:
    from .client import Client, as_reward
except ImportError:  # this file is in no package: some trainers load it by its path
    spec = importlib.util.spec_from_file_location("client", Path(__file__).with_name("client.py"))
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
    Client, as_reward = client.Client, client.as_reward

SERVER = "http://127.0.0.1:8000"
served = lru_cache(maxsize=None)(Client)  # one for each address


def rewards(score, videos, prompts, unusable: float | None = None,
            **how) -> tuple[list[float], list[dict]]:
    """A reward and a record for each video. how: fps, layout."""
    records, found = score(videos, prompts, **how), []
    for place, record in enumerate(records):
        if record["error"] is not None and unusable is None:
            raise ValueError(f"video {place}: {record['error']}")
        found.append(as_reward(record) if record["error"] is None else float(unusable))
    return found, records


def flow_grpo(score, fps: float, unusable: float | None = None) -> Callable:
    """For flow_grpo, what stands in `multi_score`'s score_functions; for GenRL, what its
    reward_module calls `descore_score`.

    Returns `descore_score(device)`, which returns f(videos, prompts, metadata) → (rewards, {});
    videos (B, F, 3, H, W) in [0, 1], rewards (B,) float32 on the device."""

    def descore_score(device=None):
        def ask(videos, prompts, metadata=None):
            found, _ = rewards(score, videos, prompts, unusable, fps=fps, layout="TCHW")
            return torch.tensor(found, dtype=torch.float32, device=device), {}

        return ask

    return descore_score


class VideoAlign:
    """For DanceGRPO, and whoever calls VideoAlign's VideoVLMRewardInference: files in, dicts out.

    DeScore gives one number. TA (does it follow the prompt) and Overall are what it means; VQ and
    MQ, of which it knows nothing, are that number too, so that a trainer trains on DeScore whichever
    it reads: DanceGRPO reads VQ and MQ (`--vq_coef 1 --mq_coef 0`). So Overall is no sum here, and a
    sum of them counts one thing several times. DanceGRPO catches whatever is raised and takes −1 for
    it, without a word; so each failure is printed here, with how many there were, `failed`."""

    def __init__(self, score: Callable, unusable: float | None = None):
        self.score, self.unusable, self.failed = score, unusable, 0

    def reward(self, video_paths, prompts, fps=None, num_frames=None, max_pixels=None,
               use_norm: bool = True) -> list[dict[str, float]]:
        """Raises ValueError for fps, num_frames, max_pixels: the model's settings say these."""
        try:
            if (fps, num_frames, max_pixels) != (None, None, None):
                raise ValueError("fps, num_frames and max_pixels are in the model's own settings")
            found, records = rewards(self.score, video_paths, prompts, self.unusable)
        except Exception as error:
            self.failed += len(video_paths)
            print(f"DeScore: no reward, {self.failed} so far: {error}", file=sys.stderr, flush=True)
            raise
        if not use_norm:
            found = [one if record["error"] is not None else record["score"]
                     for one, record in zip(found, records)]
        return [dict.fromkeys(("VQ", "MQ", "TA", "Overall"), one) for one in found]


class FlowFactory:
    """For Flow-Factory, in front of its own class:

        class DeScoreReward(FlowFactory, PointwiseRewardModel):
            score, fps = Client("http://127.0.0.1:8000"), 16
    """

    required_fields = ("prompt", "video")
    use_tensor_inputs = True  # frames as they were generated; lists of PIL images do as well
    score, fps, unusable = None, None, None

    # It gathers and moves what is named here; for **kwargs, every tensor that a sample has.
    def __call__(self, prompt, video=None) -> SimpleNamespace:
        """prompt: B texts; video: B of (T, 3, H, W) in [0, 1], or of lists of PIL images. Returns
        rewards (B,) and extra_info."""
        if video is None:
            raise ValueError("DeScore scores videos, and there is none")
        found, records = rewards(self.score, list(video), prompt, self.unusable, fps=self.fps,
                                 layout="TCHW")
        extra = {name: [record[name] for record in records]
                 for name in ("score", "cot", "sub_scores", "error")}
        return SimpleNamespace(rewards=torch.tensor(found, dtype=torch.float32), extra_info=extra)


class UniRL:
    """For unirl-reward-service, where it is weighed with that service's own rewards. It stands in
    front of its class:

        class DeScoreScorer(UniRL, BaseScorer):
            pass

    A video that cannot be scored has NaN, as BaseScorer asks for; the reason is printed."""

    name, sub_metric_names = "descore", ("reward",)

    def __init__(self, server_url: str = SERVER, unusable: float = math.nan, ask=None):
        self.ask, self.unusable = ask or served(server_url), unusable

    def score(self, items) -> list[dict[str, float]]:
        """Of each item's last turn, whose video is a path or the bytes of a file."""
        videos, prompts = [], []
        with ExitStack() as stack:
            for item in items:
                video = item.videos and item.videos[-1]
                if not video:
                    raise ValueError("DeScore scores videos, and the last turn has none")
                if not isinstance(video, str):
                    file = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".mp4"))
                    file.write(video)
                    file.flush()
                    video = file.name
                videos.append(video)
                prompts.append(item.history[-1][0])
            found, records = rewards(self.ask, videos, prompts, self.unusable)
        for place, record in enumerate(records):
            if record["error"] is not None:
                print(f"DeScore: item {place}: {record['error']}", file=sys.stderr, flush=True)
        return [{"reward": one} for one in found]


class VideoXFun:
    """For VideoX-Fun: stands in videox_fun/reward/reward_fn.py, by an import, and is made of
    `--reward_fn_kwargs`."""

    def __init__(self, score: Callable | None = None, fps: float | None = None,
                 unusable: float | None = None, server_url: str = SERVER, device=None, dtype=None):
        """device, dtype: of a model in this process, which this is not."""
        self.score, self.fps, self.unusable = score or served(server_url), fps, unusable

    def __call__(self, batch_frames: torch.Tensor, batch_prompt: list[str]) -> tuple:
        """(loss, reward), each a mean over the batch. Raises RuntimeError where a gradient is to flow
        through them: there is none behind a CoT."""
        if batch_frames.requires_grad:
            raise RuntimeError("DeScore's score has no gradient for the frames: it cannot train by "
                               "VideoX-Fun's reward back-propagation, but by GRPO, DPO or best of N")
        reward = self.get_reward(batch_frames, batch_prompt).mean()
        return -reward, reward

    def get_reward(self, batch_frames: torch.Tensor, batch_prompt: list[str]) -> torch.Tensor:
        """batch_frames: (B, 3, T, H, W) in [0, 1]. Returns (B,); no gradient flows through it."""
        found, _ = rewards(self.score, batch_frames, batch_prompt, self.unusable, fps=self.fps,
                           layout="CTHW")
        return torch.tensor(found, dtype=torch.float32, device=batch_frames.device)


async def compute_score_descore(
        data_source, solution_image, ground_truth, extra_info=None, *, score: Callable | None = None,
        server_url: str = SERVER, fps: float | None = None, unusable: float | None = None,
        layout: str | None = None, **kwargs) -> dict[str, float]:
    """For verl-omni, of whose settings this file and this name are two; server_url, fps, unusable and
    layout are more (`reward_functions.<key>.fps=16`). extra_info may say fps too.

    solution_image: uint8, or float in [0, 1], (T, 3, H, W), or by its shape or by `layout` "CTHW"
    (3, T, H, W); ground_truth: the prompt."""
    fps = (extra_info or {}).get("fps") if fps is None else fps
    if layout is None:
        layout = "CTHW" if solution_image.shape[0] == 3 != solution_image.shape[1] else "TCHW"
    ask = partial(rewards, score or served(server_url), solution_image, [ground_truth], unusable,
                  fps=fps, layout=layout)
    (found,), (record,) = await asyncio.get_running_loop().run_in_executor(None, ask)
    return {"score": found, "descore_raw": record["score"]}
