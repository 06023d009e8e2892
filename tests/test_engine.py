"""tools/engine.py: an engine thinks, and the trainer's forward says log π and the score.

The engine here is tests/fake_vllm.py, which does plainly what is asked of one. A real one is asked where
DESCORE_ENGINE_PYTHON names the python of an environment that has vLLM (docs/scale.md)."""

import json
import os
import signal
import subprocess
import sys
import time

import fake_vllm
import pytest
import torch
from conftest import ROOT, TOY_VIDEO
from launch import run

from data import DataError, Processor, VideoSettings, patchify
from model import DeScore
from tools import engine

PYTHON = os.environ.get("DESCORE_ENGINE_PYTHON")
SECONDS = [0.0, 0.2, 0.55, 1.31, 1.4, 2.0, 12.9, 13.05]  # not even ones


@pytest.fixture
def vllm(monkeypatch):
    """An engine that notes what it is asked."""
    for notes in fake_vllm.NOTES.values():
        notes.clear()
    for name in ("EXTRA", "SHORT"):
        monkeypatch.setattr(fake_vllm, name, [])
    fake_vllm.install(lambda name, module: monkeypatch.setitem(sys.modules, name, module))
    engine.engine_of.cache_clear()
    yield fake_vllm
    engine.engine_of.cache_clear()


@pytest.fixture
def policy(tmp_path):
    """The embedded backbone with an adapter that does something."""
    torch.manual_seed(0)
    model = DeScore.load(ROOT / "toy/backbone", device="cpu")
    model.set_trainable(4)
    move(model)
    return model


@torch.no_grad()
def move(model, what=".lora_"):
    for name, parameter in model.named_parameters():
        if what in name:
            parameter.add_(0.02 * torch.randn(parameter.shape))


def videos(processor, prompts=("a red circle", "a blue cross stands still")):
    """A batch of clips of noise, in two sizes."""
    samples = []
    for number, prompt in enumerate(prompts):
        frames = torch.randint(256, (8 - 2 * number, 3, 64, 48 + 16 * number), dtype=torch.uint8)
        sample = processor.sample(frames, SECONDS[: len(frames)], prompt)
        sample.source = (f"clip{number}.mp4", prompt)
        samples.append(sample)
    return processor.collate(samples)


def test_frames_come_out_of_patches_as_they_went_in():
    settings = VideoSettings(patch_size=8)
    frames = torch.randint(256, (6, 3, 32, 48), dtype=torch.uint8)
    assert torch.equal(engine.unpatchify(*patchify(frames, settings), settings), frames)


def test_thoughts_are_the_engines_and_figures_the_trainers(vllm, policy):
    """Each rollout of a video has a seed of its own; the end token is there where there is one."""
    batch = videos(policy.processor)
    thoughts = engine.think(policy, batch, 3, 9, 0.7, 0.9, seeds=[4, 5])
    assert len({one["seed"] for one in vllm.NOTES["sampling"]}) == 6
    wanted = []
    for one in vllm.NOTES["sampling"]:
        assert one["temperature"] == 0.7 and one["top_p"] == 0.9 and one["max_tokens"] == 9
        wanted.append([*policy.processor.encode(vllm.COTS[one["seed"] % 3]), policy.eos][:9])
    assert {len(row) for row in wanted} >= {1, 9}  # an empty one, and one that is cut off
    written = []
    for tokens, mask in zip(thoughts.tokens.flatten(0, 1), thoughts.mask.flatten(0, 1)):
        written.append(tokens[mask].tolist())
    assert written == wanted
    assert thoughts.tokens.shape == (2, 3, 9) and (thoughts.tokens[~thoughts.mask] == policy.eos).all()
    with torch.no_grad():
        logps, scores = policy.group(batch, thoughts.tokens, thoughts.mask, 0.7)
    torch.testing.assert_close(thoughts.logps, logps)
    torch.testing.assert_close(thoughts.scores, scores)
    assert thoughts.sampler_gap.shape == (2, 3) and thoughts.sampler_gap.max() < 1e-4
    again = engine.think(policy, batch, 3, 9, 0.7, 0.9, seeds=[4, 5])
    assert torch.equal(again.tokens, thoughts.tokens)


def test_a_gap_is_the_largest_of_its_rollout(vllm, policy, monkeypatch):
    answer = fake_vllm.LLM.answer

    def off(self, model, question, one):
        found = answer(self, model, question, one)
        for step in found.outputs[0].logprobs[1:2]:
            for token in step.values():
                token.logprob += 0.25
        return found

    monkeypatch.setattr(fake_vllm.LLM, "answer", off)
    gaps = engine.think(policy, videos(policy.processor), 3, 9, seeds=[4, 5]).sampler_gap.flatten()
    lengths = [len(vllm.COTS[one["seed"] % 3]) for one in vllm.NOTES["sampling"]]
    wanted = torch.tensor([0.25 if length else 0.0 for length in lengths])
    torch.testing.assert_close(gaps, wanted, atol=1e-4, rtol=0)


def test_the_adapter_of_the_moment_is_asked_for_by_a_name_of_its_own(vllm, policy):
    batch = videos(policy.processor)
    engine.think(policy, batch, 1, 5, seeds=[1, 2])
    engine.think(policy, batch, 1, 5, seeds=[3, 4])  # as it was
    move(policy)
    gap = engine.think(policy, batch, 1, 5, seeds=[1, 2]).sampler_gap
    first, again, second = vllm.NOTES["adapters"]
    assert first == again and first[0] != second[0] and first[1] != second[1]
    assert gap.max() < 1e-4
    (options,) = vllm.NOTES["started"]
    assert options["enable_lora"] and options["max_lora_rank"] == 8


def test_what_an_earlier_stage_changed_outside_the_adapter_is_in_the_engines_backbone(vllm, tmp_path):
    torch.manual_seed(0)
    model = DeScore.load(ROOT / "toy/backbone", device="cpu")
    model.set_trainable(4, train_merger=True)
    move(model)
    move(model, "merger")
    model.save(tmp_path / "stage1")
    before = (ROOT / "toy/backbone/model.safetensors").read_bytes()
    model = DeScore.load(tmp_path / "stage1", device="cpu")
    model.set_trainable(4)
    thoughts = engine.think(model, videos(model.processor), 1, 9, seeds=[1, 3])
    assert thoughts.sampler_gap.max() < 1e-4
    assert (ROOT / "toy/backbone/model.safetensors").read_bytes() == before
    engine.engine_of.cache_clear()
    model.changed.clear()  # as if nobody knew
    assert engine.think(model, videos(model.processor), 1, 9, seeds=[1, 3]).sampler_gap.max() > 1e-2


def test_a_model_without_an_adapter_asks_for_none(vllm):
    model = DeScore.load(ROOT / "toy/backbone", device="cpu")
    model.has_head = True
    assert engine.think(model, videos(model.processor), 1, 9, seeds=[1, 3]).sampler_gap.max() < 1e-4
    assert not vllm.NOTES["adapters"] and "enable_lora" not in vllm.NOTES["started"][0]


ASKED = ["Watch: <video> Asked: <prompt>", "<video><prompt>, judge it, <1.5 seconds> long.",
         "<1.5 seconds><|vision_start|>\n<video>\n<prompt>"]


@pytest.mark.parametrize("instruction", ASKED)
def test_the_engines_prompt_is_ours_whatever_stands_around_the_video(instruction, vllm, policy):
    policy.processor = Processor(policy.processor.tokenizer, policy.processor.settings, instruction)
    engine.think(policy, videos(policy.processor), 1, 3, seeds=[1, 2])


def test_another_prompt_is_refused(vllm, policy):
    vllm.EXTRA.append("?")
    with pytest.raises(DataError, match=r"clip0\.mp4: the engine's prompt is not ours: \d+ tokens, not \d+, "
                                        r"and from token \d+ on '\?"):
        engine.think(policy, videos(policy.processor), 2, 3, seeds=[1, 2])


def test_an_engine_that_stops_early_is_refused(vllm, policy):
    vllm.SHORT.append(2)
    with pytest.raises(DataError, match=r"clip0\.mp4: the engine stopped after 2 tokens, and may write 9"):
        engine.think(policy, videos(policy.processor), 3, 9, seeds=[4, 5])


def test_what_an_engine_cannot_have_is_refused_by_name(vllm, policy, monkeypatch):
    batch = videos(policy.processor)
    with pytest.raises(DataError, match="the batch has no patches"):
        engine.think(policy, policy.encode(batch), 1, 3)
    with pytest.raises(DataError, match=r"a top_p of 2 is not from"):
        engine.think(policy, batch, 1, 3, top_p=2)
    for settings, name in (((4, True), r"visual\..*merger\S+"), ((0,), r"language_model\.\S+")):
        policy.set_trainable(*settings)
        with pytest.raises(DataError, match=rf"{name} trains, .*without --train-merger"):
            engine.think(policy, batch, 1, 3)
    policy.quant = "4bit"
    with pytest.raises(DataError, match="--quant 4bit: an engine's weights are whole"):
        engine.think(policy, batch, 1, 3)
    monkeypatch.setattr(engine.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(engine.dist, "get_world_size", lambda: 2)
    with pytest.raises(DataError, match="works with one process, not with 2"):
        engine.think(policy, batch, 1, 3)
    assert not vllm.NOTES["started"]


def test_without_vllm_it_is_said_where_it_is_told_how_to_get_it(policy, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(DataError, match=r"tools/engine\.py needs vLLM, see docs/scale\.md"):
        engine.think(policy, videos(policy.processor), 1, 3)


def test_what_it_has_started_ends_with_it():
    with subprocess.Popen(["sleep", "60"]) as started:
        with engine.end_with_us([started.pid]) as watch:
            assert started.poll() is None
            watch.stdin.close()  # as when a process dies
        assert started.wait(30) == -signal.SIGKILL


def test_what_it_starts_hears_no_signal_that_is_for_the_run():
    """Nobody else loses any, and one that comes meanwhile is not lost."""
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with engine.signals_are_ours(), subprocess.Popen(["sleep", "60"]) as started:
            for number in (signal.SIGINT, signal.SIGTERM):
                started.send_signal(number)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            assert started.poll() is None
            started.kill()
        assert heard == [signal.SIGINT]
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT, signal.SIGTERM}
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------------------------
# Stage 2

OWN = """
import json

import fake_vllm
from tools import engine

fake_vllm.install()


def think(*args):
    thoughts = engine.think(*args)
    with open({notes!r}, "w") as file:
        json.dump(fake_vllm.NOTES, file)
    return thoughts
"""


def stage2(world_dir, out, rollouts):
    return ["rl.py", "--model", ROOT / "toy/backbone", "--train", world_dir / "train.jsonl", "--out", out,
            "--rollouts", rollouts, "--steps", 2, "--batch-size", 2, "--updates", 1, "--group-size", 3,
            "--max-new-tokens", 12, "--lora-rank", 4, "--lr", 1e-2, "--workers", 0, "--think-tokens", 1,
            "--eval-before", "false", "--no-gradient-checkpointing", *TOY_VIDEO]


@pytest.mark.slow
def test_rollouts_are_those_of_a_function_of_ones_own(world_dir, tmp_path):
    """What the engine asked of each rollout batch, and how far it was from the trainer, which is logged."""
    (tmp_path / "own.py").write_text(OWN.format(notes=str(tmp_path / "notes.json")))
    run(*stage2(world_dir, tmp_path / "out", f"{tmp_path}/own.py:think"))
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines[:2]):
        assert 0 < line["sampler_gap"] < 1e-4 and line["logp_gap"] < 1e-4 and line["grad_norm"] > 0
    notes = json.loads((tmp_path / "notes.json").read_text())
    # Each batch has two micro-batches of a pair.
    assert notes["adapters"] == [["adapter 1", 1]] * 2 + [["adapter 2", 2]] * 2
    assert len(notes["started"]) == 1 and len({one["seed"] for one in notes["sampling"]}) == 24
    kept = map(json.loads, (tmp_path / "out/rollouts.jsonl").read_text().splitlines())
    texts = [rollout["cot"] for video in kept for rollout in video["rollouts"]]
    assert len(texts) == 24 and all(any(cot.startswith(text) for cot in fake_vllm.COTS) for text in texts)


@pytest.mark.parametrize(("given", "message"), [
    ("tools/engine.py", "tools/engine.py: not FILE:FUNCTION"),
    ("tools/engine.py:thinks", "has no function 'thinks'"), ("missing.py:think", "missing.py is no Python")])
def test_a_function_that_is_not_there_is_missed_before_anything_else(given, message, world_dir, tmp_path):
    done = run(*stage2(world_dir, tmp_path / "out", given), check=False)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {given}: ") and message in done.stderr
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------
# A real engine


ABSENT = "DESCORE_ENGINE_PYTHON names no python that has vLLM"
REAL = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason=ABSENT)]


@pytest.mark.parametrize("mergers", [pytest.param(False, marks=REAL), pytest.param(True, marks=REAL)])
def test_a_real_engine_thinks_as_we_do(mergers, world_dir, tmp_path):
    """Also where an earlier stage trained the mergers, with which its backbone is written anew."""
    torch.manual_seed(0)
    model = DeScore.load(ROOT / "toy/backbone", device="cpu")
    model.set_trainable(16, train_merger=mergers)
    move(model)
    if mergers:
        move(model, "merger")
    model.save(tmp_path / "model")
    command = [PYTHON, ROOT / "tests/engined.py", tmp_path / "model", world_dir / "test_id.jsonl", "4"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["anew"] == mergers
    for name in ("saved", "moved"):
        greedy = found[name]
        assert greedy["equal"] == greedy["cots"] == 4, greedy
        assert greedy["sampler_gap"] < 1e-4 and greedy["logps"] < 1e-5 and greedy["scores"] < 1e-3
    assert found["drawn"]["by the same seeds"] and not found["drawn"]["by others"]
    assert found["drawn"]["twins"] < 4 and found["drawn"]["adapters"] == 2


def in_group(group):
    """The processes of a process group."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True)
    rows = [row.split(maxsplit=2) for row in listed.stdout.splitlines()]
    return [row for row in rows if row[0] == str(group) and not row[1].startswith("Z")]


@pytest.mark.parametrize("both", [pytest.param((signal.SIGINT, signal.SIGTERM), marks=REAL)])
def test_a_run_that_is_told_to_stop_ends_as_one_without_an_engine(both, world_dir, tmp_path, request):
    """Ctrl-C in a terminal, and SIGTERM to all processes, while the engine works; then it goes on."""
    words = [*stage2(world_dir, tmp_path / "out", "tools/engine.py:think"), "--steps", 20]
    words[words.index("--max-new-tokens") + 1] = 140
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    metrics = tmp_path / "out/metrics.jsonl"
    steps = 0
    for number in both:
        with (tmp_path / "said").open("w") as said:
            run = subprocess.Popen([PYTHON, *map(str, words)], cwd=ROOT, env=env, stdout=said, stderr=said,
                                   start_new_session=True)
        request.addfinalizer(run.kill)  # the engine ends with it
        while not metrics.exists() or metrics.read_text().count("\n") <= steps:
            assert run.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.1)
        time.sleep(0.3)  # into the next rollouts
        os.killpg(run.pid, number)
        assert run.wait(300) == 0
        text = (tmp_path / "said").read_text()
        now = metrics.read_text().count("\n")
        assert f"stopped after step {now} of 20; the same command goes on" in text and "Traceback" not in text
        assert now > steps and (tmp_path / f"out/checkpoints/step-{now}").is_dir()
        end = time.monotonic() + 60
        while in_group(run.pid):
            assert time.monotonic() < end, in_group(run.pid)
            time.sleep(0.1)
        steps = now
