"""Each adapter is called as its trainer calls a reward: signature, type, range, threads; what comes back is
what the trainer reads, and the numbers are those of `infer.reward`."""

import asyncio
import inspect
import math
import os
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import world
from conftest import ROOT
from test_memory import decoded, save_scorer

from data import DataError
from infer import Scorer, reward
from tools import adapters
from tools.adapters import FlowFactory, UniRL, VideoAlign, VideoXFun, compute_score_descore, flow_grpo
from tools.client import unusable

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


def test_genrl(scorer, clips, expected):
    """It makes NAME_score of a module for a device, multiplies what comes back by a weight, and stacks it
    with other rewards on that device."""
    others = torch.tensor([1.0, 3.0], device="cpu")
    found, rest = flow_grpo(scorer, fps=world.FPS)(torch.device("cpu"))(clips[1], PROMPTS, {})
    assert found.dtype == torch.float32 and found.shape == (2,) and rest == {}
    assert torch.stack([found * 2, others]).mean(0).tolist() == near(
        [(2 * one + other) / 2 for one, other in zip(expected[1], others.tolist())])
    meta, _ = flow_grpo(lambda *_, **how: [{"score": 0.0, "standardised": 1.0, "error": None}], 8)("meta")(
        clips[1][:1], PROMPTS[:1], {})
    assert meta.device.type == "meta"


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


def test_what_dance_grpo_keeps_to_itself_is_printed_and_counted(capsys):
    """It catches every exception, and takes −1 for it."""
    def away(videos, prompts):
        raise RuntimeError("http://there:1/score: connection refused")

    inferencer = VideoAlign(away)
    for total in (1, 3):
        with pytest.raises(RuntimeError, match="refused"):
            inferencer.reward(["a.mp4", "b.mp4"][:total], ["p", "q"][:total])
        assert inferencer.failed == total
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f" {total} so far" in said and "http://there:1" in said


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
    # What it gathers of a sample, and moves; where a signature has **kwargs, every tensor.
    assert [*inspect.signature(model.__call__).parameters] == ["prompt", "video"] == [*model.required_fields]
    assert model.use_tensor_inputs and "image" not in model.required_fields
    images = [[Image.fromarray((frame.permute(1, 2, 0) * 255).round().byte().numpy()) for frame in video]
              for video in clips[1]]
    for video in (list(clips[1]), images):
        output = model(prompt=PROMPTS, video=video)
        found = torch.as_tensor(output.rewards, device="cpu", dtype=torch.float32)
        assert found.shape == (2,) and found.tolist() == near(expected[1])
        assert output.extra_info["score"] == near(expected[0]) and output.extra_info["cot"][0]
    with pytest.raises(ValueError, match="video 1: .*not from 0 to 1"):
        model(prompt=PROMPTS, video=list(noisy))
    with pytest.raises(ValueError, match="there is none"):
        model(prompt=PROMPTS)
    DeScoreReward.unusable = -3.0
    output = model(prompt=PROMPTS, video=list(noisy))
    assert output.rewards.tolist() == near([expected[1][0], -3.0]) and output.extra_info["error"][1]


def test_unirl_reward_service(scorer, clips, expected, tmp_path, monkeypatch, capsys):
    """It makes a BaseScorer by keyword and gives it items: turns of a text and an image, and beside them
    videos, the bytes of a file or a path. NaN is its word for one that has no score."""
    Item = namedtuple("Item", "history videos metadata", defaults=[None, None])

    class BaseScorer:
        name, sub_metric_names = "", ()

    class DeScoreScorer(UniRL, BaseScorer):
        pass

    kept = []

    def ask(videos, prompts):
        kept.extend(Path(video).read_bytes() for video in videos)
        return scorer(videos, prompts)

    monkeypatch.setattr(adapters, "served", {"http://there:1": ask}.get)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    service = DeScoreScorer(server_url="http://there:1")
    assert service.name == "descore" and service.score([]) == []
    sent = Path(clips[0][0]).read_bytes()
    items = [Item([("earlier", None), (PROMPTS[0], None)], (None, sent)),
             Item([(PROMPTS[1], None)], (clips[0][1],)), Item([("p", None)], (b"no video",))]
    found = service.score(items)
    assert all([*one] == list(service.sub_metric_names) for one in found)
    assert kept == [sent, Path(clips[0][1]).read_bytes(), b"no video"]
    assert [one["reward"] for one in found[:2]] == near(expected[1]) and math.isnan(found[2]["reward"])
    assert "item 2: " in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert DeScoreScorer("http://there:1", unusable=-2.0).score(items[2:]) == [{"reward": -2.0}]
    for videos in (None, (None,)):
        with pytest.raises(ValueError, match="has none"):
            service.score([Item([("p", None)], videos)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_videox_fun(scorer, clips, expected, noisy, dtype, monkeypatch):
    """It makes the class of a device, a type and the JSON of a flag, and reads a mean loss and a mean
    reward, or a reward for each video."""
    monkeypatch.setattr(adapters, "served", {"http://there:1": scorer}.get)
    model = VideoXFun(device="cpu", dtype=dtype, server_url="http://there:1", fps=world.FPS)
    frames = clips[1].transpose(1, 2).to(dtype)
    mean = sum(expected[1]) / 2
    assert [one.item() for one in model(frames, PROMPTS)] == near([-mean, mean])
    with pytest.raises(RuntimeError, match="no gradient"):
        model(frames.clone().requires_grad_(), PROMPTS)
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


def test_verl_omni_gives_clips_of_two_layouts_and_says_what_an_unusable_one_is_worth(
        scorer, clips, expected, noisy):
    frames = clips[1][0]

    def ask(clip, **settings):
        asked = {"data_source": "any", "solution_image": clip, "ground_truth": PROMPTS[0], "fps": world.FPS}
        return asyncio.run(compute_score_descore(**asked, score=scorer, **settings))

    colour_first = frames.transpose(0, 1)
    three = ask(frames[:3])["score"]
    assert ask(colour_first)["score"] == near(expected[1][0])
    assert ask(colour_first[:, :3], layout="CTHW")["score"] == near(three)
    with pytest.raises(ValueError, match="not from 0 to 1"):
        ask(noisy[1])
    assert ask(noisy[1], unusable=-2.0)["score"] == -2.0


def test_what_verl_omnis_settings_say_of_an_unusable_video_is_a_number():
    """They may have it as a text, and a reward that is one fails far from here."""
    noisy = torch.full((4, 3, 8, 8), 2.0)
    ask = partial(compute_score_descore, "any", noisy, "p", fps=8,
                  score=lambda *_, **how: [unusable("noise")])
    found = asyncio.run(ask(unusable="-2"))["score"]
    assert type(found) is float and found == -2
    with pytest.raises(ValueError, match="'none'"):
        asyncio.run(ask(unusable="none"))


def test_verl_omni_asks_the_server_that_is_named(monkeypatch):
    asked = []

    def served(url):
        return lambda videos, prompts, **how: asked.append((url, prompts, how)) or [
            {"score": 1.0, "standardised": None, "error": None}]

    monkeypatch.setattr(adapters, "served", served)
    found = asyncio.run(compute_score_descore("any", torch.zeros(4, 3, 2, 2), "p", {"fps": 8},
                                              server_url="http://there:1"))
    assert found == {"score": 1.0, "descore_raw": 1.0}
    assert asked == [("http://there:1", ["p"], {"fps": 8, "layout": "TCHW"})]


def test_three_frames_are_no_riddle(scorer, clips):
    """Trainers' shapes are known, so that a clip of three frames needs no layout."""
    three = clips[1][:, :3]
    found, _ = flow_grpo(scorer, fps=world.FPS)("cpu")(three, PROMPTS, None)
    assert VideoXFun(scorer, fps=world.FPS).get_reward(three.transpose(1, 2), PROMPTS).tolist() == near(
        found.tolist())


def test_an_unusable_video_is_an_error_or_a_number(scorer, noisy, expected):
    with pytest.raises(ValueError, match="video 1: .*not from 0 to 1"):
        flow_grpo(scorer, fps=world.FPS)("cpu")(noisy, PROMPTS, None)
    found, _ = flow_grpo(scorer, fps=world.FPS, unusable=-2.0)("cpu")(noisy, PROMPTS, None)
    assert found.tolist() == near([expected[1][0], -2.0])


def test_they_can_be_copied_beside_the_client(tmp_path):
    """Into a folder, or into a package, in which a trainer may load them by their path."""
    package = tmp_path / "rewards"
    package.mkdir()
    for folder in (tmp_path, package):
        for name in ("adapters.py", "client.py"):
            (folder / name).write_text((ROOT / "tools" / name).read_text())
    (tmp_path / "client.py").rename(tmp_path / "there.py")
    (tmp_path / "client.py").write_text("raise SystemExit('another module of this name')")
    code = """if True:
        import importlib.util, sys
        import rewards.adapters
        assert rewards.adapters.Client is sys.modules["rewards.client"].Client
        spec = importlib.util.spec_from_file_location("custom_module_1", "rewards/adapters.py")
        by_path = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(by_path)
        assert "custom_module_1" not in sys.modules
        import os; os.rename("there.py", "client.py")
        import adapters
        for module in (rewards.adapters, by_path, adapters):
            print(module.VideoAlign(module.Client()).score.url)
        assert not {"transformers", "data"} & set(sys.modules)"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    out = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True)
    assert out == 3 * "http://127.0.0.1:8000\n"
