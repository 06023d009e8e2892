"""Commands that are called here, with stand-ins for what takes long: each flag reaches what it is for.

tests/flags.py has their flags, and the names of these tests."""

import json
import math
import sys
from types import SimpleNamespace

import ceilings
import claims
import memory as memory_bench
import numpy as np
import post_train
import prepare
import pretrain
import pytest
import swapped
import torch
from conftest import ROOT, TOY_VIDEO
from test_formats import ANSWER, SCORES, endpoint  # noqa: F401 (a fixture)
from test_serve import frames_in

from data import VideoSettings, read_pairs, read_video
from support.batches import THINK_TOKENS
from tools import annotate, probe
from tools import pairs as pair_maker
from tools import serve as serving
from tools.client import unusable
from tools.shown import data_url
from tools.together import b_comes_first


@pytest.fixture
def call(monkeypatch):
    """Call the main of a module with words of a command line."""

    def called(module, *words):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        return module.main()

    return called


@pytest.mark.parametrize("module", [serving, pair_maker, probe])
def test_a_model_of_no_name_is_not_the_usual_one(module, call, capsys):
    """As a variable that is not set would be."""
    with pytest.raises(SystemExit):
        call(module, "in.jsonl", "out.jsonl", "--model", "")
    assert "argument --model: it is empty" in capsys.readouterr().err


def noting(monkeypatch, owner, name, result=None):
    """Put in the place of a function one that keeps what it is called with."""
    calls = []
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append((args, kwargs)) or result)
    return calls


# ------------------------------------------------------------------------------------------------------------
# An endpoint that annotates


def test_an_endpoint_is_asked_as_the_flags_say(endpoint, call, world_dir, tmp_path, monkeypatch):  # noqa: F811
    pairs = world_dir / "train.jsonl"

    def asked(name, *more):
        endpoint.seen.clear()
        endpoint.most = 0
        with pytest.raises(SystemExit, match="0"):
            call(annotate, pairs, tmp_path / name, "--api", endpoint.url, "--api-model", "judge-2",
                 *TOY_VIDEO, *more)
        return endpoint.seen, read_pairs(tmp_path / name)

    before = read_pairs(pairs)
    monkeypatch.setenv("KEY", "secret")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    seen, plain = asked("plain.jsonl", "--api-key-env", "KEY", "--parallel", 2, "--max-new-tokens", 77,
                        "--temperature", 0.4)
    assert len(seen) == 24 and endpoint.most == 2
    for body, key in seen:
        assert key == "Bearer secret"
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("judge-2", 77, 0.4)
    assert [pair.scores_a for pair in plain] == [pair.scores_a for pair in before] and plain[0].cot_a
    _, scored = asked("scored.jsonl", "--scores")
    assert {json.dumps(pair.scores_b) for pair in scored} == {json.dumps(SCORES)} and endpoint.most > 2
    assert {key for _, key in seen} == {None}

    both = json.loads(ANSWER.removeprefix("<answer>").removesuffix("</answer>"))["dimensional_scores"]
    answer = {"video_1_scores": both, "video_2_scores": both, "video_1_overall": 4.0, "video_2_overall": 2.0}
    endpoint.reply = staticmethod(lambda parts: f"<answer>{json.dumps(answer)}</answer>")
    found = {}
    for seed in (0, 6):
        seen, annotated = asked(f"together-{seed}.jsonl", "--scores", "--together", "--seed", seed)
        assert len(seen) == 12
        firsts = [pair.overall_a == 2.0 for pair in annotated]  # 4 is what was said of the first
        assert firsts == [b_comes_first(seed, *[video for video, _ in pair.videos()], pair.prompt)
                          for pair in annotated]
        found[seed] = firsts
    assert found[0] != found[6]
    shown = {part["image_url"]["url"] for body, _ in seen for part in body["messages"][0]["content"]
             if part["type"] == "image_url"}
    settings = annotate.VideoSettings(min_pixels=4096, max_pixels=4096)
    assert data_url(read_video(before[0].video_a, settings)[0][0]) in shown


def test_an_endpoint_is_waited_for_as_long_and_asked_as_often_as_told(
        endpoint, call, world_dir, tmp_path, capsys):  # noqa: F811
    common = [world_dir / "train.jsonl", tmp_path / "out.jsonl", "--api", endpoint.url, "--api-model", "x",
              "--parallel", 1, *TOY_VIDEO]
    endpoint.plan[:] = ["500"] * 9
    with pytest.raises(SystemExit, match="1"):
        call(annotate, *common, "--retries", 2)
    assert capsys.readouterr().err.count(": gave up after 3 attempts: HTTP 500") == 3
    first = endpoint.seen[0]
    assert endpoint.seen[:3] == [first] * 3 and endpoint.seen.count(first) == 3
    endpoint.plan[:] = ["slow"]  # 1.5 seconds
    with pytest.raises(SystemExit, match="1"):
        call(annotate, *common, "--retries", 0, "--timeout", 0.3)
    assert capsys.readouterr().err.count(": gave up after 1 attempt: timed out after 0.3 seconds") == 1


# ------------------------------------------------------------------------------------------------------------
# The server


INFO = {"args": {"max_new_tokens": 77}}  # of the run that trained the model


class Asked:
    """Stands for a Scorer: keeps how it was made and what it is asked."""

    made, calls = [], []
    scoring_settings = VideoSettings()

    def __init__(self, *args, **kwargs):
        self.made.append((args, kwargs))
        processor = SimpleNamespace(settings=VideoSettings())
        self.model = SimpleNamespace(processor=processor, scoring_settings=self.scoring_settings, info=INFO)

    def __call__(self, videos, prompts, **options):
        self.calls.append((videos, prompts, options))
        found = {"p": {"score": 1.0, "cot": "", "error": None}, "q": {"error": "it cannot be scored"}}
        return [unusable(None) | found[prompt] for prompt in prompts]


class Startup:
    """What a start of the server made: its service, its scorer, and where and by which names it is asked."""

    def __init__(self, service, hosts, address):
        self.service, self.hosts, self.address = service, hosts, address
        (self.made,) = Asked.made
        frames = frames_in(np.zeros((4, 16, 16, 3), np.uint8))
        asked = service.compute(json.dumps({"prompt": ["p", "q"], "video": [frames, frames]}).encode())
        self.clips = asked.videos
        jobs = service.rounds.ask(list(zip(asked.videos, asked.prompts)))
        self.rewards = asked.reply([job.result(30) for job in jobs])["rewards"]
        (_, _, self.options), *_ = Asked.calls


@pytest.fixture
def served(call, monkeypatch):
    """Start a server with flags."""
    monkeypatch.setattr(serving, "Scorer", Asked)
    given, addresses = [], []

    class Server:
        """Listens to nobody."""

        def __init__(self, app, folder):
            pass

        def run(self, sockets):
            addresses.append(sockets[0].getsockname()[0])
            sockets[0].close()

        def leave(self, status):
            pass

    make_app = serving.make_app
    monkeypatch.setattr(serving, "make_app", lambda *args: given.append(args) or make_app(*args))
    monkeypatch.setattr(serving, "Server", Server)
    monkeypatch.setattr(serving, "made_by", lambda model, args: {})

    def start(*flags):
        monkeypatch.setattr(Asked, "made", [])
        monkeypatch.setattr(Asked, "calls", [])
        call(serving, "--port", 0, *flags)
        service, _, hosts = given[-1]
        return Startup(service, hosts, addresses[-1])

    return start


def test_a_server_is_what_its_flags_say(served, monkeypatch):
    away = noting(monkeypatch, serving, "think_at")
    found = served(
        "--model", "m", "--device", "cuda:1", "--host", "127.0.0.2", "--fps", 5, "--reader", "decord",
        "--unusable", -2.5, "--window", 0.3, "--samples", 2, "--max-new-tokens", 7, "--temperature", 0.8,
        "--seed", 4, "--think-tokens", 99, "--cot", "off", "--accept-any", "--round", 3, "--kept", 5,
        "--allow-host", "Node-7", "--allow-host", "proxy", "--think-at", "http://x/v1",
        "--think-at-model", "far", "--api-key-env", "KEY")
    (((_, args), more),) = away
    assert more == {"few": math.inf}  # it ends at no number of failures
    assert (args.think_at, args.think_at_model, args.api_key_env) == ("http://x/v1", "far", "KEY")
    assert found.made == (("m", "cuda:1"), {"window": 0.0, "reader": "decord"})
    assert found.address == "127.0.0.2" and {"node-7", "proxy", "127.0.0.2"} <= found.hosts
    assert [clip.seconds[3] for clip in found.clips] == [0.6, 0.6] and found.rewards == [1.0, -2.5]
    thinking = found.options["thinking"]
    assert found.options["think"] is False and found.options["accept_any"] is True
    assert (thinking.samples, thinking.max_new_tokens, thinking.temperature) == (2, 7, 0.8)
    assert (thinking.seed, thinking.think_tokens) == (4, 99)
    rounds = found.service.rounds
    assert (rounds.size, rounds.kept, rounds.window) == (3, 5, 0.3)

    found = served("--model", "m", "--fps", 5)
    assert len(away) == 1
    assert found.made == (("m", None), {"window": 0.0, "reader": "av"}) and found.address == "127.0.0.1"
    assert found.hosts == {"127.0.0.1", "::1", "localhost"} and found.rewards == [1.0, None]
    thinking = found.options["thinking"]
    assert found.options["think"] is True and found.options["accept_any"] is False
    assert thinking.think_tokens == THINK_TOKENS and thinking.temperature == 0
    assert thinking.max_new_tokens == 77  # as it was trained
    rounds = found.service.rounds
    assert (rounds.size, rounds.kept, rounds.window) == (16, 1000, 0.02)


def test_a_server_whose_model_scores_other_frames_than_it_thinks_about_asks_for_all(served, monkeypatch):
    assert served("--fps", 5, "--model", "m").service.sampling["fps"] == 2
    monkeypatch.setattr(Asked, "scoring_settings", VideoSettings(fps=1.0))
    assert served("--fps", 5, "--model", "m").service.sampling is None


# ------------------------------------------------------------------------------------------------------------
# The toy world and its backbone


def test_the_world_is_as_large_as_was_asked_for(world_dir):
    """Of --pairs 12 and --test-pairs 4."""
    counts = {path.stem: len(path.read_text().splitlines()) for path in world_dir.glob("*.jsonl")}
    assert counts == {"train": 12, "train_cots": 12, "test_id": 4, "test_ood": 4, "test_trap": 4}


def test_the_embedded_data_is_made_as_it_was_asked_for(call, monkeypatch, tmp_path):
    calls = noting(monkeypatch, prepare.subprocess, "run")
    call(prepare, tmp_path, "--pairs", 7, "--test-pairs", 3, "--seed", 5)
    rendered, annotated, *filtered = [" ".join(command[1:]) for (command,), _ in calls]
    assert rendered == f"toy/world.py {tmp_path} --pairs 7 --test-pairs 3 --seed 5"
    assert f"-m tools.annotate {tmp_path}/train.jsonl " in annotated
    assert annotated.endswith(" --seed 5")
    assert len(filtered) == 2


@pytest.mark.slow
def test_a_backbone_is_trained_as_it_was_asked_for(call, monkeypatch, tmp_path):
    given, rates = [], []

    class Lessons(pretrain.Lessons):
        def __init__(self, tokenizer, lesson, steps, seed, batch_size):
            given.append((len(tokenizer), lesson, steps, seed, batch_size))
            super().__init__(tokenizer, lesson, steps, seed, batch_size)

    real = torch.optim.AdamW

    def adamw(groups, lr, **options):
        rates.append(lr)
        return real(groups, lr=lr, **options)

    monkeypatch.setattr(pretrain, "Lessons", Lessons)
    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    noting(monkeypatch, pretrain, "what_is_seen", {})
    noting(monkeypatch, pretrain, "what_is_read", {})
    out = tmp_path / "backbone"
    out.mkdir()
    call(pretrain, "--out", out, "--seed", 3, "--lessons", "describe:2", "practise:1", "--batch-size", 2,
         "--lr", 0.01, "--vocab-size", 520)
    assert given == [(520, "describe", range(2), 3, 2), (520, "practise", range(2, 3), 3, 2)]
    assert rates == [0.01 * pretrain.RATES[lesson][0] for lesson in ("describe", "practise")]
    made = json.loads((out / "descore.json").read_text())["pretrained"]
    assert (made["seed"], made["lessons"], made["lr"]) == (3, ["describe:2", "practise:1"], 0.01)


# ------------------------------------------------------------------------------------------------------------
# Experiments, and what is computed of memory


def test_ceilings_are_of_the_pairs_asked_for(call, monkeypatch, capsys):
    found = {name: [1.0, 0.0] for name in ("truth", "sub-scores", "signature", "two annotators", "decided")}
    calls = noting(monkeypatch, ceilings, "ceilings", found)
    call(ceilings, "--pairs", 40, "--seed", 3)
    assert [args for args, _ in calls] == [(split, 40, 3) for split in ceilings.world.SPLITS]
    monkeypatch.undo()
    one, two = (ceilings.ceilings("test_id", 40, seed) for seed in (3, 4))
    assert len(one["decided"]) == 40 and one != two


def test_claims_are_measured_as_they_were_asked_for(call, monkeypatch):
    import results

    shown = noting(monkeypatch, results, "show")
    measured = noting(monkeypatch, claims, "measure")
    abreast = noting(monkeypatch, claims, "side_by_side")
    every = [name for name in claims.EXPERIMENTS if name != "pairs"]

    def asked(*words):
        measured.clear()
        abreast.clear()
        call(claims, *words)
        benches = [(bench.seed, bench.quick, names) for (bench, names), _ in measured]
        return benches, [args for args, _ in abreast], shown[-1][0][1]

    page = ROOT / "experiments"
    assert asked() == ([], [([0, 1, 2], None)], page)
    assert asked("--seeds", 4, 5) == ([], [([4, 5], None)], page)
    assert asked("--seeds", 4) == ([(4, False, every)], [], page)
    assert asked("--only", "masking", "--seeds", 4) == ([(4, False, ["masking"])], [], page)
    assert asked("--only", "masking") == ([], [([0, 1, 2], "masking")], page)
    assert asked("--quick") == ([(0, True, every[:1])], [], ROOT / "runs/quick")
    assert asked("--tables") == ([], [], page)
    assert asked("--tables", "--quick") == ([], [], ROOT / "runs/quick")


def test_curves_of_post_training_go_where_they_were_asked_to(call, monkeypatch, tmp_path):
    noting(monkeypatch, post_train.DeScore, "load")
    noting(monkeypatch, post_train, "fingerprint", "weights")
    shown = noting(monkeypatch, post_train, "show")
    for words, picture in ((["--picture", tmp_path / "curves.png"], tmp_path / "curves.png"), ([], None)):
        call(post_train, "--out", tmp_path, "--seeds", 0, *words)
        assert shown[-1][0] == ([], picture)


def test_as_many_videos_are_swapped_as_asked_for(call, monkeypatch):
    rendered = noting(monkeypatch, swapped.subprocess, "run")
    noting(monkeypatch, swapped, "read_pairs", [])
    noting(monkeypatch, swapped, "figures", {"quality": 0.5, "format_rate": 1.0})
    call(swapped, "--pairs", 7)
    (((command,), _),) = rendered
    assert command[command.index("--test-pairs") + 1] == "7"


def test_memory_is_computed_for_what_was_asked_for(call, monkeypatch, capsys):
    parts = {"weights": 1.0, "moments": 2.0, "gradients": 4.0, "activations": 3.0}
    calls = noting(monkeypatch, memory_bench, "step_memory", parts)
    call(memory_bench, "--prompt", 900, "--cot", 70, "--group-size", 5)
    assert len(calls) == 10 and {args[1:4] for args, _ in calls} == {(900, 70, 5)}
    assert "prompts of 900 tokens, CoTs of 70, groups of 5" in capsys.readouterr().out
