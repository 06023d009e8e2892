"""Each adapter is called as its trainer calls a reward: signature, type, range, threads; what comes back is
what the trainer reads, and the numbers are those of `infer.reward`."""

import asyncio
import inspect
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
import world
from conftest import ROOT
from test_memory import decoded, save_scorer

from data import DataError
from infer import Scorer, reward
from tools import adapters
from tools.adapters import FlowFactory, VideoAlign, VideoXFun, compute_score_descore, flow_grpo

PROMPTS = ["a red circle moves left", "a blue cross"]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    whole = Scorer(save_scorer(tmp_path_factory.mktemp("scorer") / "model"), "cpu", window=0.05)
    quick = partial(whole, max_new_tokens=4, accept_any=True)
    quick.model = whole.model
    return quick


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two files, their frames in [0, 1], (2, T, 3, H, W) float32, as a generator would give them."""
    rng, paths = np.random.default_rng(7), []
    for place in range(2):
        paths.append(tmp_path_factory.mktemp("videos") / f"{place}.mp4")
        world.write_video(paths[-1], world.render(world.Clip(world.draw_scene(rng), signature="grain"), rng))
    frames = np.stack([decoded(path)[0] for path in paths])
    return list(map(str, paths)), torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 255


@pytest.fixture(scope="module")
def expected(scorer, clips):
    """Their scores, and these in standard deviations."""
    scores = [reward(scorer.model, path, prompt, max_new_tokens=4, accept_any=True)[0]["score"]
              for path, prompt in zip(clips[0], PROMPTS)]
    assert scores[0] != pytest.approx(scores[1], abs=1e-3)
    return scores, [(score - 0.5) / 0.25 for score in scores]


@pytest.fixture
def noisy(clips):
    """The second of two videos is none."""
    frames = clips[1].clone()
    frames[1, 3] = math.nan
    return frames


def near(numbers):
    return pytest.approx(numbers, abs=1e-3)


def test_flow_grpo(scorer, clips, expected):
    """Its multi_score makes the function for a device, weighs what that returns video by video and adds it
    up; its trainer asks from eight threads, and makes tensors of what comes back."""
    factories, weights = {"descore": flow_grpo(scorer, fps=world.FPS)}, {"descore": 0.5}
    functions = {}
    for name in weights:
        takes = "device" in factories[name].__code__.co_varnames
        functions[name] = factories[name](torch.device("cpu")) if takes else factories[name]()

    def multi_score(videos, prompts, metadata, only_strict=True):
        details, total = {}, []
        for name, weight in weights.items():
            scores, rest = functions[name](videos, prompts, metadata)
            assert rest == {}
            details[name] = scores
            weighted = [weight * score for score in scores]
            total = [a + b for a, b in zip(total, weighted)] if total else weighted
        return details | {"avg": total}, {}

    executor = ThreadPoolExecutor(max_workers=8)
    futures = [executor.submit(multi_score, clips[1].flip(0) if place % 2 else clips[1],
                               PROMPTS[:: -1 if place % 2 else 1], [{}, {}], only_strict=True)
               for place in range(8)]
    for place, future in enumerate(futures):
        found, _ = future.result()
        found = {name: torch.as_tensor(value, device="cpu").float() for name, value in found.items()}
        wanted = expected[1][::-1] if place % 2 else expected[1]
        assert found["descore"].tolist() == near(wanted)
        assert found["avg"].tolist() == near([0.5 * one for one in wanted])


def test_dance_grpo(scorer, clips, expected):
    """It writes a file for each sample, asks for one at a time, and reads VQ and MQ."""
    inferencer = VideoAlign(scorer)
    for path, prompt, wanted in zip(clips[0], PROMPTS, expected[1]):
        found = inferencer.reward([path], [prompt], use_norm=True)
        for name in ("VQ", "MQ", "TA", "Overall"):
            one = torch.tensor(found[0][name]).to("cpu")
            assert one.unsqueeze(0).shape == (1,) and one.item() == near(wanted)
    whole = VideoAlign(scorer).reward(video_paths=clips[0], prompts=PROMPTS, num_frames=None, use_norm=False)
    assert [one["Overall"] for one in whole] == near(expected[0])
    with pytest.raises(ValueError, match="own settings"):
        inferencer.reward(clips[0], PROMPTS, fps=2)
    with pytest.raises(ValueError, match=r"video 1: nowhere\.mp4: no such file"):
        inferencer.reward([clips[0][0], "nowhere.mp4"], PROMPTS)
    patient = VideoAlign(scorer, unusable=-1.0)
    assert patient.reward(["nowhere.mp4"], ["p"], use_norm=False) == [
        {"VQ": -1.0, "MQ": -1.0, "TA": -1.0, "Overall": -1.0}]


def test_flow_factory(scorer, clips, expected, noisy):
    """It makes the class with its own settings, passes what the signature names, converts frames by
    use_tensor_inputs, and takes `rewards`."""
    from PIL import Image

    class PointwiseRewardModel:
        required_fields, use_tensor_inputs = ("image", "prompt"), False

        def __init__(self, config, accelerator):
            self.config, self.device = config, accelerator

        def __call__(self, prompt, image=None, video=None):
            raise NotImplementedError

    class DeScoreReward(FlowFactory, PointwiseRewardModel):
        pass

    DeScoreReward.score, DeScoreReward.fps = scorer, world.FPS
    model = DeScoreReward("settings", "cpu")
    assert model.config == "settings" and isinstance(model, PointwiseRewardModel)
    assert set(model.required_fields) <= set(inspect.signature(model.__call__).parameters)
    assert model.use_tensor_inputs and "image" not in model.required_fields
    images = [[Image.fromarray((frame.permute(1, 2, 0) * 255).round().byte().numpy()) for frame in video]
              for video in clips[1]]
    for video in (list(clips[1]), images):
        output = model(prompt=PROMPTS, video=video, metadata="{}")
        found = torch.as_tensor(output.rewards, device="cpu", dtype=torch.float32)
        assert found.shape == (2,) and found.tolist() == near(expected[1])
        assert output.extra_info["score"] == near(expected[0]) and output.extra_info["cot"][0]
    with pytest.raises(ValueError, match="video 1: .*not from 0 to 1"):
        model(prompt=PROMPTS, video=list(noisy))
    with pytest.raises(ValueError, match="there is none"):
        model(prompt=PROMPTS, image=images[0][:2])
    DeScoreReward.unusable = -3.0
    output = model(prompt=PROMPTS, video=list(noisy))
    assert output.rewards.tolist() == near([expected[1][0], -3.0]) and output.extra_info["error"][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_videox_fun(scorer, clips, expected, noisy, dtype):
    model = VideoXFun(scorer, fps=world.FPS)
    found = model.get_reward(clips[1].transpose(1, 2).to(dtype), PROMPTS)
    assert found.shape == (2,) and found.dtype == torch.float32 and found.tolist() == near(expected[1])
    with pytest.raises(ValueError, match="video 1: "):
        model.get_reward(noisy.transpose(1, 2), PROMPTS)
    with pytest.raises(DataError, match="the colour's axis is not 3"):
        model.get_reward(clips[1], PROMPTS)


def test_verl_omni(scorer, clips, expected):
    """It calls by keyword, one sample at a time, many at once, and awaits what is a coroutine."""
    assert inspect.iscoroutinefunction(compute_score_descore)
    frames = (clips[1] * 255).round().byte()

    async def run_all():
        return await asyncio.gather(*[
            compute_score_descore(data_source="any", solution_image=frames[place],
                                  ground_truth=PROMPTS[place],
                                  extra_info={"num_turns": None} | ({"fps": world.FPS} if place else {}),
                                  score=scorer, fps=None if place else world.FPS, model_name="x")
            for place in range(2)])

    found = asyncio.run(run_all())
    assert [one["score"] for one in found] == near(expected[1])
    assert [one["descore_raw"] for one in found] == near(expected[0])
    assert all(type(value) is float for one in found for value in one.values())
    with pytest.raises(ValueError, match="fps=…"):
        asyncio.run(compute_score_descore("any", frames[0], "p", {}, score=scorer))


def test_verl_omni_asks_the_server_that_is_named(monkeypatch):
    asked = []

    def served(url):
        return lambda videos, prompts, **how: asked.append((url, prompts, how)) or [
            {"score": 1.0, "standardised": None, "error": None}]

    monkeypatch.setattr(adapters, "served", served)
    found = asyncio.run(compute_score_descore("any", None, "p", {"fps": 8}, server_url="http://there:1"))
    assert found == {"score": 1.0, "descore_raw": 1.0}
    assert asked == [("http://there:1", ["p"], {"fps": 8, "layout": "TCHW"})]


def test_three_frames_are_no_riddle(scorer, clips):
    """Trainers' shapes are known, so that a clip of three frames needs no layout."""
    three = clips[1][:, :3]
    found, _ = flow_grpo(scorer, fps=world.FPS)("cpu")(three, PROMPTS, None)
    assert VideoXFun(scorer, fps=world.FPS).get_reward(three.transpose(1, 2), PROMPTS).tolist() == near(found)


def test_an_unusable_video_is_an_error_or_a_number(scorer, noisy, expected):
    with pytest.raises(ValueError, match="video 1: .*not from 0 to 1"):
        flow_grpo(scorer, fps=world.FPS)("cpu")(noisy, PROMPTS, None)
    found, _ = flow_grpo(scorer, fps=world.FPS, unusable=-2.0)("cpu")(noisy, PROMPTS, None)
    assert found == near([expected[1][0], -2.0])


def test_they_can_be_copied_beside_the_client(tmp_path):
    for name in ("adapters.py", "client.py"):
        (tmp_path / name).write_text((ROOT / "tools" / name).read_text())
    code = ("import sys, adapters; assert 'transformers' not in sys.modules and 'data' not in sys.modules; "
            "print(adapters.VideoAlign(adapters.Client()).score.url)")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    out = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True)
    assert out == "http://127.0.0.1:8000\n"
