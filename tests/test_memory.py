"""Videos in memory: frames score as their file does, whatever holds them; what is no video is an error."""

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest
import torch
import world
from conftest import ROOT, in_layout

from data import DataError, VideoSettings, read_video
from infer import Scorer, reward
from model import DeScore
from tools import memory
from tools.client import Client
from tools.memory import Clip, Frames, Together, clip_keys, number_of

SHORT = {"max_new_tokens": 6, "accept_any": True}
SHARED = ROOT.parent / "shared/videos"


def decoded(path):
    """All frames of a file, (T, H, W, 3) uint8, and its rate."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return np.stack(frames), float(container.streams.video[0].average_rate)


def tensor(frames):
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def pictures(frames):
    from PIL import Image
    return [Image.fromarray(frame) for frame in frames]


HELD = {
    "uint8 TCHW": tensor,
    "uint8 CTHW": lambda frames: tensor(frames).transpose(0, 1),
    "uint8 THWC array": lambda frames: frames,
    "float32 TCHW": lambda frames: tensor(frames).float() / 255,
    "float32 CTHW": lambda frames: tensor(frames).transpose(0, 1).float() / 255,
    "float32 array": lambda frames: (frames / 255).astype(np.float32),
    "float64 TCHW": lambda frames: tensor(frames).double() / 255,
    "float16 TCHW": lambda frames: (tensor(frames).float() / 255).half(),
    "with a gradient": lambda frames: (tensor(frames).float() / 255).requires_grad_(),
    "PIL": pictures,
}


@pytest.fixture(scope="module")
def loaded():
    """The embedded backbone in float64, with a query and a head that do something."""
    torch.manual_seed(0)
    model = DeScore.load(ROOT / "toy/backbone", dtype=torch.float64, device="cpu").double()
    model.has_head = True
    return model


@pytest.fixture
def model(loaded):
    """The same for all; what a test changes of it is put back."""
    info, head = dict(loaded.info), loaded.head.weight.data.clone()
    yield loaded
    in_layout(loaded, "ours")
    loaded.info, loaded.head.weight.data = info, head


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Files of three sizes and rates, of which two are resized; their frames, rates and prompts."""
    folder, rng, found = tmp_path_factory.mktemp("clips"), np.random.default_rng(5), []
    for place, (size, total, fps) in enumerate((((64, 64), 16, 4), ((96, 72), 21, 8), ((50, 130), 7, 3))):
        clip = world.Clip(world.draw_scene(rng), signature="grain")
        frames = world.render(clip, rng)[np.arange(total) % 16]
        rows, columns = (np.arange(length) * 64 // length for length in size)
        path = folder / f"{place}.mp4"
        world.write_video(path, np.ascontiguousarray(frames[:, rows][:, :, columns]), fps)
        found.append((str(path), *decoded(path), f"a red circle moves left, {place}"))
    return found


@pytest.fixture(scope="module")
def scorer_dir(tmp_path_factory):
    """A saved model with a head that a fixed seed has drawn, and a scale."""
    return save_scorer(tmp_path_factory.mktemp("scorer") / "model")


def save_scorer(folder):
    torch.manual_seed(0)
    model = DeScore.load(ROOT / "toy/backbone", device="cpu")
    model.set_trainable(4)
    model.save(folder, score_mean=0.5, score_std=0.25)
    return folder


# ------------------------------------------------------------------------------------------------------------
# Frames score as their file does


def files_and_frames(model, clips, held, **how):
    paths, frames, rates, prompts = map(list, zip(*clips))
    expected = reward(model, paths, prompts, **how)
    assert all(record["error"] is None and math.isfinite(record["score"]) for record in expected)
    assert len({record["score"] for record in expected}) == len(clips)
    return expected, reward(model, [HELD[held](some) for some in frames], prompts, fps=rates, **how)


@pytest.mark.parametrize("held", HELD)
def test_frames_have_their_files_score(model, clips, held):
    expected, found = files_and_frames(model, clips, held, **SHORT)
    assert found == expected  # bit for bit


@pytest.mark.parametrize("how", [{"think": False}, {"samples": 2, "temperature": 0}])
def test_frames_have_their_files_score_however_it_is_asked(model, clips, how):
    expected, found = files_and_frames(model, clips, "float32 TCHW", **SHORT, **how)
    assert found == expected


@pytest.mark.parametrize("size", [None, {"max_pixels": 1024, "min_pixels": 256}])
def test_frames_have_their_files_score_in_the_releases_layout(model, clips, size):
    in_layout(model, "release").info |= {"scoring_video": size} if size else {}
    expected, found = files_and_frames(model, clips, "float32 CTHW", **SHORT)
    assert found == expected


@pytest.mark.parametrize(("name", "held"), [
    ("example_1_A", "uint8 TCHW"), ("example_2_A", "uint8 CTHW"), ("example_3_B", "float32 CTHW")])
def test_real_clips(model, name, held):
    path = SHARED / f"{name}.mp4"
    if not path.is_file():
        pytest.skip("no ../shared")
    frames, fps = decoded(path)
    expected = reward(model, path, "A girl sits on a chair.", **SHORT)
    assert reward(model, HELD[held](frames), "A girl sits on a chair.", fps=fps, **SHORT) == expected
    ours, seconds = read_video(Frames(list(frames), fps), VideoSettings(min_pixels=4096, max_pixels=100_000))
    theirs, their_seconds = read_video(path, VideoSettings(min_pixels=4096, max_pixels=100_000))
    assert torch.equal(ours, theirs) and seconds == their_seconds


def test_a_score_is_that_of_the_frames_that_should_be_sampled(model, clips):
    """Two frames a second, evenly, at the seconds at which they stand, calculated here."""
    _, frames, fps, prompt = clips[0]
    indices = np.linspace(0, 15, 8).round().astype(int)
    sample = model.processor.sample(tensor(frames)[indices], (indices / fps).tolist(), prompt)
    thoughts = model.think(model.encode(model.processor.collate([sample])), 1, 6, temperature=0)
    (found,) = reward(model, tensor(frames).float() / 255, prompt, fps=fps, **SHORT)
    assert found["score"] == pytest.approx(thoughts.scores.item(), abs=1e-6)
    assert found["cot"] == model.processor.decode(thoughts.tokens[0, 0])


def test_the_rate_that_is_told_counts(model, clips):
    _, frames, fps, prompt = clips[0]
    slow, fast = (reward(model, tensor(frames), prompt, fps=rate, **SHORT)[0]["score"]
                  for rate in (fps, 2 * fps))
    assert slow != fast


def test_batches_and_lists_are_the_videos_in_their_order(model, clips):
    _, frames, fps, prompt = clips[0]
    one = tensor(frames)
    batch = torch.stack([one, one.flip(0)])
    expected = reward(model, [one, one.flip(0)], prompt, fps=fps, **SHORT)
    assert expected[0]["score"] != expected[1]["score"]
    for videos in (batch, batch.transpose(1, 2), batch.numpy(), batch.permute(0, 1, 3, 4, 2),
                   [batch[:1], batch[1]], [[one], [one.flip(0)]], (pictures(frames), one.flip(0)),
                   pictures(frames) and [pictures(frames), pictures(frames[::-1])]):
        assert reward(model, videos, [prompt, prompt], fps=[fps, fps], **SHORT) == expected
    assert reward(model, pictures(frames), prompt, fps=fps, **SHORT) == expected[:1] == reward(
        model, batch[:1], [prompt], fps=fps, **SHORT)
    assert reward(model, [], []) == reward(model, batch[:0], [], fps=fps) == []


def test_three_frames_need_a_layout(model, clips):
    _, frames, fps, prompt = clips[0]
    three = tensor(frames)[:3]
    with pytest.raises(DataError, match=r"it may be TCHW or CTHW: say layout=…"):
        reward(model, three, prompt, fps=fps)
    first, second, third = (
        reward(model, three, prompt, fps=fps, layout="TCHW", **SHORT),
        reward(model, three.transpose(0, 1), prompt, fps=fps, layout="CTHW", **SHORT),
        reward(model, three.transpose(0, 1), prompt, fps=fps, layout="TCHW", **SHORT))
    assert first == second != third


# ------------------------------------------------------------------------------------------------------------
# What makes no sense


GOOD = np.zeros((4, 3, 64, 64), np.uint8)


@pytest.mark.parametrize(("videos", "prompts", "how", "message"), [
    (GOOD, "p", {}, r"frames have no rate of their own, .* fps=…"),
    ([GOOD, "a.mp4"], "p", {"fps": [None, None]}, "fps=…"),
    (GOOD, "p", {"fps": 0}, "fps is 0, not a number from 0.01"),
    (GOOD, "p", {"fps": math.nan}, "fps is nan"),
    (GOOD, "p", {"fps": math.inf}, "fps is inf"),
    (GOOD, "p", {"fps": True}, "fps is True"),
    (GOOD, "p", {"fps": "8"}, "fps is '8'"),
    (GOOD, "p", {"fps": [8, 8]}, "1 videos, but 2 fps"),
    (GOOD, ["p", "q"], {"fps": 8}, "1 videos, but 2 prompts"),
    (GOOD, [], {"fps": 8}, "1 videos, but 0 prompts"),
    (GOOD, None, {"fps": 8}, "'NoneType' object is not iterable"),
    (GOOD, [7], {"fps": 8}, "a prompt is a int, not a text"),
    (GOOD, "p", {"fps": 8, "layout": "CHWT"}, "layout is 'CHWT', none of TCHW, CTHW, THWC"),
    (GOOD, "p", {"fps": 8, "layout": "CTHW"}, "in CTHW the colour's axis is not 3"),
    (GOOD[0], "p", {"fps": 8}, r"frames of shape \(3, 64, 64\): not four axes"),
    ([*GOOD], "p", {"fps": 8}, "not four axes"),
    (GOOD[:, :1], "p", {"fps": 8}, "no axis of size 3 for colour"),
    (GOOD.astype(np.int64), "p", {"fps": 8}, "frames of int64: not uint8, nor float"),
    (torch.zeros(4, 3, 64, 64, dtype=torch.bool), "p", {"fps": 8}, "frames of bool"),
    (GOOD.astype(object), "p", {"fps": 8}, "frames of object"),
    (None, "p", {"fps": 8}, "a NoneType is no path"),
    ({"a": GOOD}, "p", {"fps": 8}, "a dict is no path"),
    (GOOD, "p", {"fps": 8, "samples": 0}, "samples or max_new_tokens below 1"),
    (GOOD, "p", {"fps": 8, "max_new_tokens": 0}, "samples or max_new_tokens below 1"),
    (GOOD, "p", {"fps": 8, "temperature": math.nan}, "temperature or seed below 0"),
    (GOOD, "p", {"fps": 8, "seed": -1}, "temperature or seed below 0")])
def test_a_call_that_makes_no_sense_is_an_error(model, videos, prompts, how, message):
    with pytest.raises(DataError, match=message) as caught:
        reward(model, videos, prompts, **how)
    assert "\n" not in str(caught.value)


def test_options_are_named(model):
    with pytest.raises(TypeError, match="positional"):
        reward(model, GOOD, "p", 8)


def test_pictures_are_of_eight_bits_and_of_colours_that_are_known(model):
    from PIL import Image
    rgb = Image.new("RGB", (64, 64), (10, 20, 30))
    for image, colour in ((rgb.convert("RGBA"), [10, 20, 30]), (Image.new("L", (64, 64), 7), [7, 7, 7])):
        assert clip_keys([image] * 4, "p", 8)[0][0].picture(1)[0, 0].tolist() == colour
    for mode in ("I;16", "F", "CMYK"):
        with pytest.raises(DataError, match=f"a frame is of {mode}"):
            clip_keys([Image.new(mode, (64, 64))] * 4, "p", 8)
    with pytest.raises(DataError, match="a frame is of ndarray"):
        clip_keys([rgb, np.zeros((64, 64, 3), np.uint8)], "p", 8)


def float_frames(value):
    frames = np.full((4, 3, 64, 64), 0.5, np.float32)
    frames[2, 1, 7, 9] = value
    return frames


UNUSABLE = {
    "above 1": (float_frames(1.001), "its values go from 0.5 to 1.001, not from 0 to 1"),
    "grey levels as floats": (float_frames(255.0), "to 255, not from 0 to 1"),
    "below 0": (float_frames(-0.5), "from -0.5 to"),
    "nan": (float_frames(np.nan), "from nan to nan"),
    "infinite": (float_frames(np.inf), "to inf"),
    "no frames": (GOOD[:0], "it has no frames"),
    "no images": ([], "it has no frames"),
    "no pixels": (np.zeros((4, 3, 0, 64), np.uint8), r"frames are of shape \(0, 64, 3\)"),
    "a stripe": (np.zeros((4, 3, 1, 400), np.uint8), "one side is over 200 times the other"),
    "no file": ("nowhere.mp4", "nowhere.mp4: no such file"),
    "no video": (ROOT / "README.md", "README.md: not a video"),
}


@pytest.mark.parametrize("case", UNUSABLE)
@pytest.mark.parametrize("think", [True, False])
def test_an_unusable_video_says_why_and_harms_no_other(model, clips, case, think):
    (path, frames, fps, prompt), (bad, message) = clips[0], UNUSABLE[case]
    (good,) = reward(model, path, prompt, think=think, **SHORT)
    found = reward(model, [path, bad, tensor(frames)], prompt, fps=fps, think=think, **SHORT)
    for one in (found[0], found[2]):
        assert one["cot"] == good["cot"] and one["score"] == pytest.approx(good["score"], abs=1e-6)
    assert math.isnan(found[1].pop("score")) and found[1].pop("error").count(message.replace("\\", "")) == 1
    assert set(found[1].values()) == {None}


def test_images_of_two_sizes_are_no_video(model):
    from PIL import Image
    sizes = [Image.new("RGB", (64, 64))] * 3 + [Image.new("RGB", (64, 80))]
    (found,) = reward(model, sizes, "p", fps=2, **SHORT)
    assert math.isnan(found["score"]) and "frames are of 2 sizes" in found["error"]


def test_a_prompt_that_cannot_be_read_is_its_own_error(model, clips):
    _, frames, fps, prompt = clips[0]
    four = tensor(frames)[None].expand(4, -1, -1, -1, -1)
    good, empty, long, half = reward(model, four, [prompt, "", "a" * 60_000, "\ud800"], fps=fps, **SHORT)
    assert good["error"] is None and empty["error"] is None and math.isfinite(empty["score"])
    assert "the prompt has 60,000 bytes" in long["error"] and "no Unicode text" in half["error"]
    # Of a served model too, whose server cannot even be told.
    (served,) = Client("http://nobody.invalid")(tensor(frames), "\ud800", fps=fps)
    assert served["error"] == half["error"] and math.isnan(served["score"])


def test_a_score_that_is_none_is_an_error_of_its_video(model, clips):
    model.head.weight.data.fill_(math.inf)
    _, frames, fps, prompt = clips[0]
    (found,) = reward(model, tensor(frames), prompt, fps=fps, **SHORT)
    assert math.isnan(found["score"]) and "broken weights" in found["error"]


def test_a_model_without_a_head_gives_no_reward(clips):
    with pytest.raises(DataError, match="has no trained"):
        reward(DeScore.load(ROOT / "toy/backbone", device="cpu"), clips[0][0], "p")
    with pytest.raises(DataError, match="has no trained"):
        Scorer(ROOT / "toy/backbone", "cpu")


@pytest.mark.parametrize(("frames", "seconds"), [
    (torch.zeros(4, 3, 64, 64), 4), (torch.zeros(4, 3, 64, 64, dtype=torch.int32), 4),
    (torch.zeros(4, 64, 64, 3, dtype=torch.uint8), 4), (torch.zeros(3, 4, 64, 64, dtype=torch.uint8), 4),
    (torch.zeros(4, 3, 64, 72, dtype=torch.uint8), 4), (torch.zeros(4, 3, 60, 64, dtype=torch.uint8), 4),
    (torch.zeros(3, 3, 64, 64, dtype=torch.uint8), 3), (torch.zeros(4, 3, 64, 64, dtype=torch.uint8), 3),
    (torch.zeros(0, 3, 64, 64, dtype=torch.uint8), 0), (torch.zeros(3, 64, 64, dtype=torch.uint8), 3),
    (torch.zeros(4, 3, 0, 64, dtype=torch.uint8), 4)])
def test_what_the_model_is_shown_is_of_one_type_and_fits(model, frames, seconds):
    with pytest.raises(DataError, match="not frames as read_video makes them"):
        model.processor.sample(frames, [0.5] * seconds, "p")


# ------------------------------------------------------------------------------------------------------------
# Once is enough


@pytest.fixture
def judged(monkeypatch):
    """The keys of each call of `judge`."""
    calls, judge = [], memory.judge

    def counted(model, keys, *args, **kwargs):
        calls.append(list(keys))
        yield from judge(model, keys, *args, **kwargs)

    monkeypatch.setattr(memory, "judge", counted)
    return calls


def test_the_same_twice_is_thought_about_once(model, clips, judged):
    path, frames, fps, prompt = clips[0]
    one, other = tensor(frames), tensor(frames).flip(0)
    videos = [one, path, other, one.clone(), path, frames, one]
    found = reward(model, videos, [prompt] * 6 + ["else"], fps=fps, **SHORT)
    assert len(judged[0]) == 4  # one, path, other, and one with another prompt
    assert found[0] == found[3] == found[5] and found[1] == found[4] != found[2] != found[6]
    found[0]["score"] = None
    assert found[3]["score"] is not None  # each has a record of its own


def test_clips_are_told_apart_by_content_and_rate():
    frames = [np.full((8, 8, 3), value, np.uint8) for value in (1, 2)]
    same = Frames([frame.copy() for frame in frames], 4.0)
    assert Frames(frames, 4.0) == same and hash(Frames(frames, 4.0)) == hash(same)
    changed = frames[1].copy()
    changed[7, 7, 2] += 1
    others = [Frames(frames, 4.0), Frames(frames, 8.0), Frames(frames[::-1], 4.0), Frames(frames[:1], 4.0),
              Frames([frames[0], changed], 4.0), Frames([frame.reshape(4, 16, 3) for frame in frames], 4.0),
              Frames([frame.astype(np.float32) / 255 for frame in frames], 4.0)]
    assert len(set(others)) == len(others) and all(isinstance(clip, Clip) for clip in others)
    keys = [(video, prompt) for video in (*others, "a.mp4", "b.mp4") for prompt in ("p", "q")]
    assert len({number_of(key) for key in keys}) == len(keys)
    assert number_of((same, "p")) == number_of((others[0], "p")) < 2**64


def test_draws_depend_on_the_video_its_prompt_and_the_seed_alone(model, clips):
    _, frames, fps, prompt = clips[0]
    one, other = tensor(frames), tensor(frames).flip(0)
    how = {"fps": fps, "samples": 2, "max_new_tokens": 12, "temperature": 3.0, "accept_any": True}
    alone = reward(model, one, prompt, **how)
    company = reward(model, [other, other, one], [prompt, "another", prompt], **how)
    assert company[2]["cot"] == alone[0]["cot"]
    assert company[2]["score"] == pytest.approx(alone[0]["score"], abs=1e-6)
    assert company[2]["score_std"] > 0
    assert reward(model, one, prompt, **how) == alone != reward(model, one, prompt, seed=1, **how)


def test_standardised_scores(model, clips):
    path = clips[0][0]
    assert reward(model, path, "p", **SHORT)[0]["standardised"] is None
    model.info |= {"score_mean": 2.0, "score_std": 4.0}
    for think in (True, False):
        (found,) = reward(model, path, "p", think=think, **SHORT)
        assert found["standardised"] == (found["score"] - 2.0) / 4.0
    assert reward(model, path, "p", standardise=False, **SHORT)[0]["standardised"] is None
    model.info["score_std"] = 0.0
    assert reward(model, path, "p", **SHORT)[0]["standardised"] is None


def test_a_trainers_random_numbers_are_its_own(model, clips):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    reward(model, clips[0][0], "p", samples=2, **SHORT)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_trainers_own_precision_is_not_ours(clips):
    path, model = clips[0][0], DeScore.load(ROOT / "toy/backbone", device="cpu")  # in float32
    model.has_head = True
    expected = reward(model, path, "p", **SHORT)
    with torch.autocast("cpu", torch.bfloat16):
        assert reward(model, path, "p", **SHORT) == expected


# ------------------------------------------------------------------------------------------------------------
# Many threads


def test_eight_threads_get_what_one_gets(scorer_dir, clips, judged):
    scorer = Scorer(scorer_dir, "cpu", window=0.3)
    scorer.model.double().dtype = torch.float64
    asked = []
    for place in range(8):
        path, frames, fps, prompt = clips[place % 3]
        asked.append(((frames if place % 2 else path), f"{prompt} {place // 3}", fps))
    expected = [reward(scorer.model, video, prompt, fps=fps, **SHORT) for video, prompt, fps in asked]
    del judged[:]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: scorer(one[0], one[1], fps=one[2], **SHORT), asked))
    assert sum(map(len, judged)) == 8 and len(judged) < 8  # and some went together
    for one, other in zip(found, expected, strict=True):
        assert one[0]["cot"] == other[0]["cot"]
        assert one[0]["score"] == pytest.approx(other[0]["score"], abs=1e-6)
        assert one[0]["standardised"] == pytest.approx((other[0]["score"] - 0.5) / 0.25)


def test_what_is_wrong_with_one_call_is_that_calls_own(scorer_dir, clips):
    scorer = Scorer(scorer_dir, "cpu", window=0.2)
    path = clips[0][0]

    def ask(how):
        try:
            return scorer(path, "p", **how)
        except (DataError, TypeError) as error:
            return type(error)

    hows = [SHORT, {"samples": 0}, SHORT, {"no_such": 1}, SHORT | {"think": False}, {"fps": math.nan}]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, hows))
    assert found[1] is DataError and found[3] is TypeError and found[5] is DataError
    assert found[0] == found[2] and found[0][0]["cot"] and found[4][0]["cot"] is None
    assert scorer([], []) == []
    (nothing,) = scorer(GOOD[:0], "p", fps=8)
    assert math.isnan(nothing["score"]) and "it has no frames" in nothing["error"]


def test_calls_are_one_at_a_time_and_answers_find_their_callers():
    busy, most, calls = [], [], []

    def work(items, options):
        busy.append(1)
        most.append(len(busy))
        calls.append(len(items))
        time.sleep(0.02)
        busy.pop()
        return [(item, options["x"]) for item in items]

    together = Together(work, 0.01)
    asked = [([f"{n}.{i}" for i in range(n % 4)], {"x": n % 2}) for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: together(*one), asked))
    assert found == [[(item, options["x"]) for item in items] for items, options in asked]
    assert max(most) == 1 and max(calls) > 3 and sum(calls) == sum(len(items) for items, _ in asked)


def test_a_call_at_which_the_model_fails_fails_alone():
    def work(items, options):
        if "bad" in items:
            raise MemoryError("too large")
        return items

    together = Together(work, 0.2)

    def ask(name):
        try:
            return together([name], {})
        except MemoryError:
            return "failed"

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, ["a", "bad", "c"])) == [["a"], "failed", ["c"]]


def test_whoever_is_interrupted_leaves_the_others_theirs():
    """While "a" is worked for, the others wait; the first of them takes all three, and is interrupted."""
    started, going, found, calls = threading.Event(), threading.Event(), {}, []

    def work(items, options):
        calls.append(items)
        if len(calls) == 1:
            started.set()
            going.wait(10)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return items

    together = Together(work, 0.0)

    def ask(name):
        try:
            found[name] = together([name], {})
        except KeyboardInterrupt:
            found[name] = "interrupted"

    threads = [threading.Thread(target=ask, args=[name], daemon=True) for name in "abcd"]
    threads[0].start()
    started.wait(10)
    for thread in threads[1:]:
        thread.start()
    while len(together.waiting) < 3 and threads[3].is_alive():
        time.sleep(0.01)
    going.set()
    for thread in threads:
        thread.join(10)
    assert calls[0] == ["a"] and sorted(calls[1]) == ["b", "c", "d"]
    (interrupted,) = [name for name, answer in found.items() if answer == "interrupted"]
    assert found == {name: [name] for name in "abcd"} | {interrupted: "interrupted"} and interrupted != "a"


def test_records_do_not_depend_on_the_order_of_a_batch(model, clips):
    paths, prompts = [clip[0] for clip in clips], [clip[3] for clip in clips]
    there, back = (reward(model, paths[::step], prompts[::step], **SHORT) for step in (1, -1))
    assert len({record["score"] for record in there}) == len(paths)
    for one, other in zip(there, back[::-1], strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-6)
