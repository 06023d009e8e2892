"""What goes through a model at one time is never more than was asked, but for a single row (a pair where
pairs train), and as much as fits. Counted from outside: rows times their width, padding and all.

    --max-tokens    stage 1: what a backward goes through, of whole rows; stage 2: a forward of the update,
                    and of π_ref, adapter or copy
    --think-tokens  prompts with the longest CoTs that they may get, K or G a video: rollouts, evaluation in
                    both stages, infer, annotate, pairs, probe, serve; videos scored behind CoTs that are
                    there (probe), or behind none (--cot off). [Reward], one more a row, is not counted here.
    LOGITS_CHUNK    tokens for which there are logits, in the backward too

The vision tower has no bound of its own: it gets the videos of one such batch."""

import importlib
import json
import sys
from itertools import groupby

import pytest
import torch
from conftest import ROOT, TOY_VIDEO
from counting import counted
from launch import run
from safetensors.torch import load_file
from test_modes import LANGUAGE, LORA, MERGERS, OWN, TOWER, batch_of, plain

import model as descore
from data import keys_of
from infer import Scorer, Thinking, judge
from model import DeScore
from support.formats import read_pairs
from tools import probe

LONGEST = 4  # tokens of a CoT
G = 3
EACH = {"thoughts": "videos", "forward": "rows"}  # what a record counts


def width(record, with_reward=False):
    """Tokens of a row, or of a video with the CoTs that it may get."""
    if record["what"] == "thoughts":
        return record["prompt"] + record["n"] * record["longest"]
    return record["width"] - (not with_reward)


def check(records, budget, widest, unit=1, **how):
    """They are within the budget but for single units, and the widest, which come first, fill it: as many are
    there as fit, or as there are."""
    batches = [(record[EACH[record["what"]]], width(record, **how)) for record in records]
    assert batches
    for rows, wide in batches:
        assert rows * wide <= budget or rows == unit, (rows, wide, budget)
    of_widest = [rows for rows, wide in batches if wide == widest]
    fit = max(1, budget // (unit * widest)) * unit
    everything = sum(rows for rows, _ in batches)
    assert of_widest and of_widest[0] == min(fit, everything), (batches, widest, budget)


def these(records, **wanted):
    return [record for record in records if wanted.items() <= record.items()]


def lengths_of(processor, keys):
    """Tokens of each prompt."""
    return {key: len(processor(*key).input_ids) for key in keys}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    torch.manual_seed(0)
    model = DeScore.load(ROOT / "toy/backbone", device="cpu")
    model.set_trainable(4)
    model.save(folder, score_mean=0.5, score_std=0.25)
    return folder


@pytest.fixture(scope="module")
def lengths(saved, world_dir):
    """Of the test set's prompts, by key."""
    processor = DeScore.load(saved, device="cpu").processor
    found = lengths_of(processor, keys_of(read_pairs(world_dir / "test_id.jsonl")))
    assert len(found) == 8 and len(set(found.values())) > 2
    return found


# ------------------------------------------------------------------------------------------------------------
# Whatever judges

# What it is told, CoTs a video, and what goes through together.
JUDGES = {
    "one CoT": ({}, 1, "thoughts"),
    "K CoTs": ({"samples": 3, "temperature": 1.0}, 3, "thoughts"),
    "no CoT": ({"think": False}, 0, "forward"),
}


@pytest.mark.parametrize("name", JUDGES)
def test_judging_fills_its_budget_and_no_more(name, saved, lengths):
    options, samples, what = JUDGES[name]
    model = DeScore.load(saved, device="cpu")
    keys = sorted(lengths, key=lengths.get)[-4:]
    widest = max(lengths.values()) + samples * LONGEST
    for budget in (3 * widest, 3 * widest - 1):
        records = []
        with counted(records.append):
            list(judge(model, keys, max_new_tokens=LONGEST, think_tokens=budget, **options))
        check(these(records, what=what), budget, widest)
        # The tower gets the videos of one such batch; all are of a size.
        patches = [one["patches"] for one in these(records, what="tower")]
        assert 0 < max(patches) < sum(patches)
        if samples:
            assert patches == [sum(patches) // 4 * one["videos"] for one in these(records, what="thoughts")]


# What is called, and how many CoTs a video gets there.
COMMANDS = {
    "infer": (["infer", "--pairs", "{pairs}"], 1),
    "infer, K CoTs": (["infer", "--pairs", "{pairs}", "--samples", "3"], 3),
    "annotate": (["tools.annotate", "{pairs}", "{out}"], 1),
    "pairs": (["tools.pairs", "{videos}", "{out}", "--samples", "3"], 3),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_thinks_within_its_budget(name, saved, lengths, world_dir, tmp_path, monkeypatch, capsys):
    (module, *words), samples = COMMANDS[name]
    with (tmp_path / "videos.jsonl").open("w") as file:
        for pair in read_pairs(world_dir / "test_id.jsonl"):
            record = {"prompt": pair.prompt, "videos": [pair.video_a, pair.video_b]}
            file.write(json.dumps(record) + "\n")
    places = {"pairs": world_dir / "test_id.jsonl", "videos": tmp_path / "videos.jsonl",
              "out": tmp_path / "out.jsonl"}
    widest = max(lengths.values()) + samples * LONGEST
    budget = 3 * widest - 1
    words = [word.format(**places) for word in words]
    flags = ["--model", saved, "--max-new-tokens", LONGEST, "--think-tokens", budget]
    monkeypatch.setattr(sys, "argv", [module, *words, *map(str, flags)])
    records = []
    with counted(records.append), pytest.raises(SystemExit, match="0"):
        importlib.import_module(module).main()
    thoughts = these(records, what="thoughts", n=samples)
    check(thoughts, budget, widest)
    assert sum(one["videos"] for one in thoughts) == len(lengths)


def test_the_probe_stays_within_its_budget_whatever_it_shows(saved, lengths):
    """A stranger's prompt may be longer than one's own, and CoTs from elsewhere than those it wrote."""
    model = DeScore.load(saved, device="cpu")
    keys = [(video, "a circle") for video, _ in list(lengths)[:4]]
    stranger = "A red circle moves left at night, the camera zooms in, then it moves right in a desert."
    own, strange = (lengths_of(model.processor, [(keys[0][0], prompt)]) for prompt in ("a circle", stranger))
    (own,), (strange,) = own.values(), strange.values()
    assert own + 10 < strange
    budget = 4 * (strange + 2) - 1
    records = []
    with counted(records.append):
        list(probe.shown(model, keys, {"a circle": stranger}, Thinking(2, think_tokens=budget)))
    check(these(records, what="thoughts"), budget, strange + 2)

    words = "a red circle moves left " * 4
    cots = {"cot_own": dict.fromkeys(keys, "red"), "cot_other": dict.fromkeys(keys, words)}
    widest = own + len(model.processor.encode(words))
    budget = 3 * widest - 1
    records = []
    with counted(records.append):
        list(probe.behind(model, cots, budget))
    check(these(records, what="forward"), budget, widest)


@pytest.mark.slow
def test_the_probes_spread_stays_within_its_budget(saved, lengths):
    model = DeScore.load(saved, device="cpu")
    keys = [(video, "a circle") for video, _ in lengths]
    (own, *_) = lengths_of(model.processor, keys).values()
    budget = 8 * (own + 10) - 1
    records = []
    with counted(records.append):
        list(probe.shown(model, keys, {}, Thinking(10, samples=3, think_tokens=budget)))
    check(these(records, what="thoughts", n=1), budget, own + 10)
    spread = these(records, what="thoughts", n=3)
    assert all(one["videos"] * width(one) <= budget for one in spread)
    videos = [one["videos"] for one in spread]
    assert sum(videos) == len(keys) and videos[0] == 2  # a third of the seven that fit with one


def test_what_is_asked_of_a_server_at_one_time_stays_within_its_budget(saved, lengths, monkeypatch, capsys):
    FastAPI = pytest.importorskip("fastapi").FastAPI
    serve = importlib.import_module("tools.serve")
    services = []
    monkeypatch.setattr(serve, "make_app", lambda service, *_: services.append(service) or FastAPI())
    monkeypatch.setattr(serve.Server, "run", lambda self, sockets: sockets[0].close())
    monkeypatch.setattr(serve.Server, "leave", lambda self, status: None)
    widest = max(lengths.values()) + 2 * LONGEST
    budget = 3 * widest - 1
    flags = ["--model", saved, "--port", 0, "--device", "cpu", "--window", 0.2, "--samples", 2,
             "--max-new-tokens", LONGEST, "--think-tokens", budget, "--accept-any"]
    monkeypatch.setattr(sys, "argv", ["serve", *map(str, flags)])
    serve.main()
    (service,) = services
    records = []
    with counted(records.append):
        jobs = [job for key in lengths for job in service.rounds.ask([key])]
        assert all(job.result(60)["error"] is None for job in jobs)
    check(these(records, what="thoughts", n=2), budget, widest)
    assert isinstance(service.rounds.score.func, Scorer)


# ------------------------------------------------------------------------------------------------------------
# Both stages


@pytest.fixture(scope="module")
def four(world_dir, tmp_path_factory):
    """A file of four pairs with CoTs, none of them a tie."""
    path = tmp_path_factory.mktemp("four") / "pairs.jsonl"
    lines = (world_dir / "train_cots.jsonl").read_text().splitlines()[:4]
    path.write_text("".join(json.dumps(json.loads(line) | {"preference": "A"}) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def runs(saved, lengths, four, world_dir, tmp_path_factory):
    """Both stages, each with budgets that two pairs, or two rows, just fill, and with one token less. Returns
    by name the folder, what was counted, the budgets, and the widest of what they are for."""
    folder = tmp_path_factory.mktemp("runs")
    processor = DeScore.load(saved, device="cpu", video={"min_pixels": 4096, "max_pixels": 4096}).processor
    pairs = read_pairs(four, root=world_dir)
    prompts = lengths_of(processor, keys_of(pairs))
    rows = []
    for pair in pairs:
        for key, cot in zip(pair.videos(), (pair.cot_a, pair.cot_b)):
            rows.append(prompts[key] + len(processor.encode(cot)) + 1)
    widest = {
        "pair": max(rows),  # a prompt, its CoT and [Reward]
        "rollouts": max(prompts.values()) + G * LONGEST,
        "row": max(prompts.values()) + G * (LONGEST + 1),
        "test": max(lengths.values()) + LONGEST,
    }

    def start(name, module, less, *flags):
        """less: tokens below what two fill."""
        two_units = 4 * widest["pair"] if module == "coldstart" else 2 * widest["row"]
        budgets = {"max": two_units - less, "think": 4 * widest["rollouts"] - less}
        run(ROOT / "tests/counting.py", folder / f"{name}.jsonl", module, "--train", four, "--root",
            world_dir, "--out", folder / name, "--batch-size", 4, "--max-tokens", budgets["max"],
            "--think-tokens", budgets["think"], "--max-new-tokens", LONGEST, "--lr", 1e-3, "--workers", 0,
            *TOY_VIDEO, *flags)
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        return folder / name, [json.loads(line) for line in lines], budgets, widest

    one = ("--epochs", 1, "--mask-p", 0, "--model", ROOT / "toy/backbone", "--lora-rank", 4)
    two = ("--steps", 1, "--updates", 1, "--group-size", G, "--beta", 0.1, "--model", folder / "coldstart")
    test = ("--test", world_dir / "test_id.jsonl", "--eval-before", "false")
    return {
        "coldstart": start("coldstart", "coldstart", 0, *one, *test),
        "coldstart less": start("coldstart less", "coldstart", 1, *one, "--no-train-merger", "--train-vision",
                                "--no-gradient-checkpointing"),
        "rl": start("rl", "rl", 0, *two, "--lora-rank", 4, *test),
        "rl less": start("rl less", "rl", 1, *two, "--lora-rank", 0, "--train-merger",
                         "--no-gradient-checkpointing"),
    }


@pytest.mark.parametrize("name", ["coldstart", "coldstart less"])
def test_a_backward_of_stage_1_goes_through_what_its_budget_holds(name, runs):
    _, records, budgets, widest = runs[name]
    trained = [one for one in records if one["what"] == "backward" or one.get("grad")]
    backwards = [list(some) for is_end, some in groupby(trained, lambda one: one["what"] == "backward")
                 if not is_end]
    held = []
    for forwards in backwards:
        check(forwards, budgets["max"], max(one["width"] for one in forwards), unit=2, with_reward=True)
        pairs = sum(one["rows"] for one in forwards) // 2
        tokens = sum(one["rows"] * one["width"] for one in forwards)
        assert tokens <= budgets["max"] or pairs == 1
        held.append(pairs)
    assert sum(held) == 4 and held[0] == (2 if name == "coldstart" else 1)
    assert backwards[0][0]["width"] == widest["pair"]


@pytest.mark.parametrize("name", ["rl", "rl less"])
def test_stage_2_thinks_and_learns_within_its_budgets(name, runs):
    """π_ref is a second adapter where --lora-rank is above 0, else a copy of the model."""
    _, records, budgets, widest = runs[name]
    rollouts = these(records, what="thoughts", n=G)
    check(rollouts, budgets["think"], widest["rollouts"], unit=2)
    assert sum(one["videos"] for one in rollouts) == 8
    for grad in (True, False):  # the update, and π_ref
        forwards = these(records, what="forward", grad=grad)
        check(forwards, budgets["max"], widest["row"], with_reward=True)
        assert sum(one["rows"] for one in forwards) == 8


@pytest.mark.parametrize("name", ["coldstart", "rl"])
def test_a_stage_evaluates_within_its_budget(name, runs, lengths):
    _, records, budgets, widest = runs[name]
    thoughts = these(records, what="thoughts", n=1)
    check(thoughts, budgets["think"], widest["test"])
    assert sum(one["videos"] for one in thoughts) == len(lengths)


TRAIN = {
    "coldstart": OWN | LORA | MERGERS,
    "coldstart less": OWN | LORA | TOWER,
    "rl": OWN | LORA,  # on the adapter of stage 1, whose mergers stay as they are
    "rl less": OWN | LANGUAGE | MERGERS,  # the adapter is merged
}


@pytest.mark.parametrize("name", TRAIN)
def test_a_stage_trains_what_its_flags_say_and_computes_again_where_they_say(name, runs):
    folder, records, *_ = runs[name]
    weights = load_file(folder / "checkpoints/step-1/rank-0.safetensors")
    trained = {plain(key.removeprefix("weight/")) for key in weights if key.startswith("weight/")}
    assert trained == TRAIN[name]
    assert all(weight.dtype == torch.float32 for key, weight in weights.items() if key.startswith("weight/"))
    forwards = 0
    for one in records:
        forwards += bool(one.get("grad"))
        if one["what"] == "backward":
            assert (one["language"], one["tower"]) == (0 if "less" in name else 5 * forwards, 0)
            forwards = 0
    saved = folder / "model/adapter_model.safetensors"
    assert saved.is_file() == (name != "rl less")


# ------------------------------------------------------------------------------------------------------------
# Logits


def test_there_are_logits_for_2048_tokens_at_a_time(saved, lengths):
    """In the backward too, which computes them again."""
    model = DeScore.load(saved, device="cpu")
    model.set_trainable(4)
    model.train()
    assert descore.LOGITS_CHUNK == 2048
    tokens = torch.arange(4 * 600).view(1, 4, 600) % 400
    records = []
    with counted(records.append):
        logps, _ = model.group(batch_of(model, list(lengths)[:1]), tokens, torch.ones_like(tokens).bool())
        logps.sum().backward()
    assert [one["tokens"] for one in these(records, what="logits")] in ([2048, 352, 352, 2048],
                                                                        [2048, 352, 2048, 352])
