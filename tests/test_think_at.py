"""Thoughts from an endpoint, and clips for it: tools/think_at.py, tools/shown.py, annotate --api-clips.

The endpoint here is tests/seeing.py, which makes its prompts as vLLM does. A real one is asked where
DESCORE_ENGINE_PYTHON names the python of an environment that has vLLM (docs/scale.md)."""

import json
import math
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, in_layout
from seeing import Seeing

import infer
from data import INSTRUCTION, DataError, Processor, VideoSettings, keys_of, make_instruction, read_video
from infer import by_key, judge
from model import DeScore
from support.formats import read_pairs
from tools import annotate, think_at
from tools.memory import Frames, reward
from tools.think_at import Thinker

PYTHON = os.environ.get("DESCORE_ENGINE_PYTHON")
LONGEST = 110  # of the CoTs here one is longer


@pytest.fixture
def endpoint(model):
    server = Seeing(model)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def moody(endpoint, monkeypatch):
    """The endpoint, which refuses prompts with "refused" in them, and is away at those with "away"."""
    answer = endpoint.answer

    def some(body):
        text = body["messages"][0]["content"][-1].get("text", "")
        for word, status in (("refused", 400), ("away", 503)):
            if word in text:
                return status, {"error": {"message": f"it is {word}"}}
        return answer(body)

    monkeypatch.setattr(endpoint, "answer", some)
    return endpoint


@pytest.fixture
def three(keys):
    """Two files, and a clip in memory whose sampled frames are not evenly spaced."""
    rng = np.random.default_rng(1)
    frames = rng.integers(256, size=(23, 48, 80, 3), dtype=np.uint8)
    return [*keys[:2], (Frames(frames, 5.3), "a red <b>circle")]


def batch_of(model, keys):
    return model.processor.collate([model.processor(*key) for key in keys])


def near(score):
    return pytest.approx(score.item(), abs=1e-5)


@pytest.mark.parametrize("layout", ["ours", pytest.param("release", marks=pytest.mark.slow)])
def test_a_cot_from_an_endpoint_has_the_score_that_it_has_here(model, endpoint, three, layout):
    """One that was cut off too. It answers so to our prompts and frames alone."""
    model = in_layout(model, layout)
    thoughts = endpoint.learn(model, batch_of(model, three), LONGEST, without_cot=True)
    truncated = model.truncated(thoughts)[:, 0].tolist()
    assert {*truncated} == {False, True}, thoughts.mask.sum(-1)
    model.think = Thinker(model, endpoint.url, "mine").think
    found = by_key(judge(model, three, max_new_tokens=LONGEST, without_cot=True))
    for b, (video, prompt) in enumerate(three):
        assert found[video, prompt] == {
            "video": video, "prompt": prompt, "truncated": truncated[b],
            "cot": model.processor.decode(thoughts.tokens[b, 0][thoughts.mask[b, 0]]),
            "score": near(thoughts.scores[b, 0]), "score_no_cot": near(thoughts.scores_no_cot[b])}
    body = endpoint.seen[-1]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("mine", LONGEST, 0)
    assert body["repetition_penalty"] == {"ours": 1.0, "release": 1.05}[layout] and "seed" not in body


def test_several_cots_of_a_video_are_drawn_by_seeds_of_their_own(model, endpoint, keys):
    batch = batch_of(model, keys[:2])
    endpoint.learn(model, batch, 12, 5, 3.0, [3, 4])
    thinker = Thinker(model, endpoint.url, "mine")
    thoughts = thinker.think(batch, 4, 12, 0.8, 0.9, seeds=[5, 6])
    asked = endpoint.seen[3:]  # by the questions that it begins with
    assert len({body["seed"] for body in asked}) == 8
    assert all(0 <= body["seed"] < 2**31 for body in asked)  # some endpoints know no larger ones
    assert {(body["temperature"], body["top_p"], body["top_k"]) for body in asked} == {(0.8, 0.9, -1)}
    again = thinker.think(batch, 4, 12, 0.8, 0.9, seeds=[5, 6])
    assert torch.equal(thoughts.tokens, again.tokens)
    assert len({str(row.tolist()) for row in thoughts.tokens.flatten(0, 1)}) > 2
    _, scores = model.group(batch, thoughts.tokens, thoughts.mask)
    torch.testing.assert_close(thoughts.scores, scores)


def test_what_counts_is_as_for_thoughts_of_its_own(model, endpoint, three):
    """A CoT that was cut off or has no answer is no judgement."""
    processor = model.processor
    processor.set_instruction(make_instruction())
    answer = f'<answer>{json.dumps({"dimensional_scores": dict.fromkeys(processor.dimensions, 2)})}</answer>'
    answers = [(answer, "stop"), (answer, "length"), ("<think>it moves", "stop")]
    for (video, prompt), told in zip(three, answers):
        frames, _ = read_video(video, processor.settings)
        endpoint.tell(processor(video, prompt).input_ids, frames, told)
    model.think = Thinker(model, endpoint.url, "mine").think
    found = reward(model, *map(list, zip(*three)), max_new_tokens=77)
    assert [record["usable"] for record in found] == [1, 0, 0]
    assert [record["error"] for record in found] == [
        None, "its CoT did not end within 77 tokens", "its CoT has no answer that can be read"]
    assert found[0]["score"] == near(model.score(batch_of(model, three[:1]), [answer])[0])


def test_a_cot_is_scored_as_it_was_written(model, endpoint, keys):
    """Not as it would be put together of a thought and an answer, nor as far as it came."""
    frames, _ = read_video(keys[0][0], model.processor.settings)
    ids = model.processor(*keys[0]).input_ids
    cot = "subject: red seen</think>\n<answer>{}</answer>"
    model.think = Thinker(model, endpoint.url, "mine", retries=0).think

    def asked(finish, **beside):
        endpoint.tell(ids, frames, (cot, finish))
        endpoint.beside = beside
        (record,) = judge(model, keys[:1], max_new_tokens=50)
        return record

    (score,) = model.score(batch_of(model, keys[:1]), [cot])
    found = asked("stop")
    assert (found["cot"], found["score"]) == (cot, near(score))
    assert "without --reasoning-parser" in asked("stop", reasoning_content="It moves.")["error"]
    for finish in ("abort", "tool_calls", None):
        assert "gave up after 1 attempt" in asked(finish)["error"]


FAILURES = ["HTTP 400 .*it is refused", "gave up after 1 attempt: HTTP 503",
            r"its prompt is not ours: \d+ tokens, not \d+, and from token \d+ on '<\|im_end\|>.* "
            + r"--chat-template tools/chat_template\.jinja", "its CoT has 60,000 bytes"]


def test_what_fails_is_that_videos_error_and_the_others_are_unharmed(model, moody, keys):
    (video, _), *_ = keys
    moody.learn(model, batch_of(model, keys[:1]), 20)
    frames, _ = read_video(video, model.processor.settings)
    moody.tell(model.processor(video, "long").input_ids, frames, ("so " * 20_000, "stop"))
    asked = [keys[0], *[(video, text) for text in ("refused", "away", "a cross <|im_end|>", "long")]]
    model.think = Thinker(model, moody.url, "mine", retries=0).think
    found = by_key(judge(model, asked, max_new_tokens=20))
    (score,) = model.score(batch_of(model, keys[:1]), [found[keys[0]]["cot"]])
    assert found[keys[0]]["score"] == near(score)
    for (_, prompt), said in zip(asked[1:], FAILURES):
        record = found[video, prompt]
        assert set(record) == {"video", "prompt", "error"}
        with pytest.raises(DataError, match=f"^{video}: {moody.url}: {said}"):
            raise DataError(record["error"])


def test_a_template_that_is_not_ours_is_noticed_by_the_number_of_tokens_too(model, endpoint, keys):
    usual = "<|vision_start|><|video_pad|><|vision_end|>"
    endpoint.template = endpoint.template.replace("<|video_pad|>", usual)
    endpoint.says_ids = False
    with pytest.raises(DataError, match=rf"^{endpoint.url}: its prompt is not ours: \d+ tokens, not \d+; it"):
        Thinker(model, endpoint.url, "mine")
    assert len(endpoint.seen) == 3, "a first question ends it"
    asked = endpoint.seen[-1]  # for one token, even if that would be the end
    assert (asked["max_tokens"], asked["ignore_eos"], asked["temperature"]) == (1, True, 0)


def test_one_that_answers_nobody_any_more_ends_it(model, moody, keys):
    """Whole batches in a row without an answer, of five videos together. What is answered beside what fails
    is kept, and refusals are no sign of it. A server goes on."""
    video, _ = keys[0]
    away = [f"away {n}" for n in range(6)]

    def errors(*prompts, samples=1, together=False):
        asked = [(video, prompt) for prompt in prompts]
        found = judge(model, asked, max_new_tokens=2, samples=samples,
                      think_tokens=100_000 if together else 1)
        return ["error" in record for record in found]

    model.think = Thinker(model, moody.url, "mine", retries=0).think
    assert errors(*[f"refused {n}" for n in range(9)]) == [True] * 9
    assert errors(*away[:4]) == [True] * 4
    assert errors("here") == [False]
    assert errors(*away[:4]) == [True] * 4
    assert sorted(errors(*away, "here", together=True)) == [False, *[True] * 6]
    assert errors(*away[:4], samples=3) == [True] * 4  # of videos, however many CoTs
    gone = f"^{moody.url}: 5 videos in a row without an answer; the last: {video}: .*HTTP 503"
    with pytest.raises(DataError, match=gone):
        errors(away[4])
    model.think = Thinker(model, moody.url, "mine", retries=0, few=math.inf).think
    assert errors(*away, *away) == [True] * 12


def test_a_thought_that_the_prompt_begins_is_scored_as_one(model, endpoint, keys):
    """As with a -Thinking checkpoint: an endpoint's answer then lacks the tag that opens it."""
    model.processor.opening = "<think>\n"
    batch = batch_of(model, keys[:1])
    for text in ("red, so 2\n</think>\n<answer>", "red, so"):
        endpoint.tell(batch.input_ids[0], read_video(keys[0][0], model.processor.settings)[0], (text, "stop"))
        found = Thinker(model, endpoint.url, "mine").think(batch, 1, 20)
        assert found.errors == [None]
        assert found.tokens[0, 0].tolist() == [*model.processor.encode(text), model.eos]


def test_an_endpoint_that_takes_no_clips_gets_pictures_and_it_is_said(model, endpoint, keys, capsys,
                                                                         monkeypatch):
    endpoint.takes_clips = False
    thinker = Thinker(model, endpoint.url, "mine")
    assert f"{endpoint.url}: gets pictures, not clips: HTTP 400" in capsys.readouterr().err
    model.think = thinker.think
    (record,) = judge(model, keys[:1], max_new_tokens=9)
    assert record["cot"] == "<think>?" and record["truncated"] and "score" in record
    parts = endpoint.seen[-1]["messages"][0]["content"]
    assert {part["type"] for part in parts} == {"text", "image_url"}
    usual = {"model", "messages", "max_tokens", "temperature"}
    assert set(endpoint.seen[-1]) == usual  # such an endpoint may know no others
    thinker.think(batch_of(model, keys[:1]), 2, 9, 0.8, 0.9, seeds=[5])
    for body in endpoint.seen[-2:]:
        assert set(body) == usual | {"seed", "top_p"} and body["top_p"] == 0.9
    assert endpoint.seen[-1]["seed"] != endpoint.seen[-2]["seed"]
    thinker.think(batch_of(model, keys[:1]), 1, 9, 0.0, repetition_penalty=1.2)
    assert set(endpoint.seen[-1]) == usual | {"repetition_penalty"}
    monkeypatch.setattr(model, "own_penalty", lambda temperature: 1.05)
    thinker.think(batch_of(model, keys[:1]), 1, 9, 0.0)
    assert set(endpoint.seen[-1]) == usual


def test_one_whose_prompt_has_no_times_gets_pictures_too(model, endpoint, monkeypatch, capsys):
    answer = endpoint.answer

    def timeless(body):
        status, found = answer(body)
        return status, found | {"usage": {"prompt_tokens": 30}}

    monkeypatch.setattr(endpoint, "answer", timeless)
    assert not Thinker(model, endpoint.url, "mine").clips
    assert "the times of a clip's frames are not in its prompt" in capsys.readouterr().err
    endpoint.shutdown()
    endpoint.server_close()
    with pytest.raises(DataError, match=f"^{endpoint.url}: gave up after 1 attempt: no answer"):
        Thinker(model, endpoint.url, "mine", retries=0)


# ------------------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture
def call(monkeypatch, model):
    """Call infer.py or annotate; returns its exit code."""
    monkeypatch.setattr(infer.DeScore, "load", classmethod(lambda cls, *args, **more: model))

    def called(module, *words):
        vars(model).pop("think", None)
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        with pytest.raises(SystemExit) as end:
            module.main()
        return end.value.code

    return called


def test_judgements_say_who_thought(model, endpoint, call, world_dir, tmp_path, monkeypatch):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text((world_dir / "test_id.jsonl").read_text().splitlines()[0] + "\n")
    out = tmp_path / "judged.jsonl"
    monkeypatch.setenv("KEY", "secret")
    words = ["--pairs", pairs, "--root", world_dir, "--model", "x", "--max-new-tokens", 2, "--out"]
    away = ["--think-at", endpoint.url, "--think-at-model", "mine", "--api-key-env", "KEY"]
    assert call(infer, *words, out, *away) == 0 and endpoint.keys == "Bearer secret"
    assert call(infer, *words, tmp_path / "own.jsonl") == 0
    theirs, ours = ([json.loads(line) for line in path.read_text().splitlines()]
                    for path in (out, tmp_path / "own.jsonl"))
    assert theirs[0]["made_by"] == ours[0]["made_by"] | {"think_at_model": "mine", "api_clips": True}
    assert [record["cot"] for record in theirs[1:]] == ["<think>?"] * (len(ours) - 1)
    asked = len(endpoint.seen)
    assert call(infer, *words, out, *away) == 0 and len(endpoint.seen) == asked + 3  # of no video
    for more, names in (([], "think_at_model, api_clips"), ([*away, "--think-at-model", "other"],
                                                            "think_at_model")):
        monkeypatch.setattr(sys, "argv", ["infer", *map(str, words), str(out), *more])
        with pytest.raises(DataError, match=f"made otherwise than this command would, by {names}"):
            infer.main()


@pytest.mark.parametrize(("given", "message"), [
    ({"think_at": None}, "--think-at URL and --think-at-model NAME go together"),
    ({"think_at_model": None}, "--think-at URL and --think-at-model NAME go together"),
    ({"cot": "off"}, "--think-at: with --cot off nothing is thought")])
def test_flags_that_do_not_go_together_are_refused(given, message):
    usual = {"think_at": "http://x/v1", "think_at_model": "m", "cot": "on", "api_key_env": "KEY"}
    with pytest.raises(DataError, match=message):
        think_at.think_at(None, Namespace(**usual | given))


def test_annotate_shows_clips_where_it_is_told_to(model, endpoint, call, world_dir, tmp_path, capsys):
    """The prompts are those of a Qwen3-VL here with the same instruction, and OUT.cots knows it."""
    pairs = world_dir / "test_id.jsonl"
    flags = ["--api", endpoint.url, "--api-model", "m", "--min-pixels", 4096, "--max-pixels", 4096]
    settings = VideoSettings(min_pixels=4096, max_pixels=4096)
    here = Processor(endpoint.tokenizer, replace(settings, patch_size=8), INSTRUCTION)
    keys = list(dict.fromkeys(keys_of(read_pairs(pairs))))
    for number, (video, prompt) in enumerate(keys):
        frames, seconds = read_video(video, settings)
        ids = here.sample(frames, seconds, prompt).input_ids
        scores = dict.fromkeys(here.dimensions, 2)
        answer = json.dumps({"dimensional_scores": scores})
        finish = "stop" if number else "length"
        endpoint.tell(ids, frames, (f"<think>{number}</think><answer>{answer}</answer>", finish))
    written = tmp_path / "out.jsonl.cots"
    assert call(annotate, pairs, tmp_path / "out.jsonl", *flags, "--api-clips") == 1  # one is cut off
    head, *records = map(json.loads, written.read_text().splitlines())
    assert head["made_by"]["api_clips"] is True
    found = {(record["video"], record["prompt"]): record["cot"] for record in records}
    assert all(f"<think>{number}</think>" in found[key] for number, key in enumerate(keys))
    with pytest.raises(DataError, match="made otherwise than this command would, by api_clips"):
        call(annotate, pairs, tmp_path / "out.jsonl", *flags)
    with pytest.raises(DataError, match="--api-clips is for --api, and not for --together"):
        call(annotate, pairs, tmp_path / "b.jsonl", *flags, "--api-clips", "--scores", "--together")
    endpoint.takes_clips = False
    with pytest.raises(DataError, match="no pair has CoTs of use"):
        call(annotate, pairs, tmp_path / "c.jsonl", *flags, "--api-clips")
    assert "gets pictures, not clips" in capsys.readouterr().err
    assert "api_clips" not in (tmp_path / "c.jsonl.cots").read_text()


# ------------------------------------------------------------------------------------------------------------
# A real server


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A saved model with an adapter that does something."""
    torch.manual_seed(0)
    found = DeScore.load(ROOT / "toy/backbone", device="cpu")
    found.set_trainable(16)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.02 * torch.randn(parameter.shape))
    folder = tmp_path_factory.mktemp("adapted") / "model"
    found.save(folder)
    return folder


@pytest.fixture(scope="module")
def server(adapted, tmp_path_factory):
    """vLLM's own server with the backbone and the adapter, as docs/scale.md starts one."""
    page = (ROOT / "docs/scale.md").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^    vllm serve (.*)$", page, re.MULTILINE)
    words = line.replace("Qwen/Qwen3-VL-8B-Instruct", f"{ROOT}/toy/backbone")
    words = shlex.split(words.replace("runs/rl/model", str(adapted)))
    words[words.index("--max-lora-rank") + 1] = "16"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", *words, "--port", str(port), "--dtype",
             "float32", "--enforce-eager", "--skip-mm-profiling", "--no-enable-chunked-prefill"]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    log = tmp_path_factory.mktemp("server") / "said"
    with log.open("w") as said:
        process = subprocess.Popen([PYTHON, *words], cwd=ROOT, env=env, stdout=said, stderr=said)
    try:
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="DESCORE_ENGINE_PYTHON names no python that has vLLM")
def test_a_real_server_thinks_as_we_do(server, adapted, three):
    """A prompt that were not ours would be an error."""
    model = DeScore.load(adapted, device="cpu")
    ours = by_key(judge(model, three, max_new_tokens=LONGEST, without_cot=True))
    thinker = Thinker(model, server, "descore")
    assert thinker.clips
    model.think = thinker.think
    theirs = by_key(judge(model, three, max_new_tokens=LONGEST, without_cot=True))
    assert {record["truncated"] for record in ours.values()} == {False, True}
    for key, record in ours.items():
        assert theirs[key]["cot"] == record["cot"] and theirs[key]["truncated"] == record["truncated"]
        for name in ("score", "score_no_cot"):
            assert theirs[key][name] == pytest.approx(record[name], abs=1e-4)
    several = thinker.think(batch_of(model, three), 2, 30, 1.0, seeds=[1, 2, 3])
    again = thinker.think(batch_of(model, three), 2, 30, 1.0, seeds=[1, 2, 3])
    assert several.errors == [None] * 3 and torch.equal(several.tokens, again.tokens)
    # What annotate asks, with its own instruction.
    settings = VideoSettings(min_pixels=4096, max_pixels=4096)
    api = annotate.Api(server, "descore", settings, max_new_tokens=5, clips=True)
    here = Processor(model.processor.tokenizer, replace(settings, patch_size=8), INSTRUCTION)
    for video, prompt in three:
        parts, beside = api.question({"<video>": video}, prompt)
        answer = api.endpoint.ask(parts, beside | {"return_token_ids": True})
        frames, seconds = read_video(video, settings)
        assert answer["prompt_ids"] == here.sample(frames, seconds, prompt).input_ids.tolist()
