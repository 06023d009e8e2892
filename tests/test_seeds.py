"""What a seed decides, and what is drawn for whom: each differs where it should and is equal where it should.

    drawn                            by                                   not by
    order of the pairs               --seed, epoch
    masks of a step's pairs          --seed, step, place                  side (tests/test_steps.py)
    a rollout in training            --seed, step, place, side, number    ranks, micro-batches, company
    start of LoRA, query and head    --seed, where a model has none       ranks, stage
    CoTs of a run's evaluations      number of the video                  --seed, step, ranks
    CoTs of infer, pairs, annotate   --seed, number of the video          its name
    CoTs of serve                    --seed, the video and its prompt     its name, its number
    the probe's pairs, other
    prompts and CoTs                 --seed
    first video of annotate
    --together                       --seed, the pair                     (its coin: tests/test_formats.py)
    clips of toy/world.py            --seed, split, number                (tests/test_world.py)
    think without seeds              torch's own generator
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import prepare
import pytest
import torch
import world
from conftest import ROOT, TOY_VIDEO
from launch import run, run_ranks
from safetensors.torch import load_file

import coldstart
import infer
import rl
from coldstart import mask_pairs, order
from data import read_pairs
from model import DeScore
from support.batches import draw_seed
from support.ranks import ALONE
from tools import annotate, pairs, probe

HOT = 3.0
RANK = 4
THINK = ["--model", ROOT / "toy/backbone", "--temperature", HOT, "--max-new-tokens", 12]
PROMPT = "A red circle moves left."
NAMES = ("a.mp4", "b.mp4", "c.mp4", "d.mp4")


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------
# What is drawn, as a function of numbers

DRAWN = {
    "order": lambda seed, epoch: order(30, epoch + 1, seed)[30 * epoch:],
    "masks": lambda seed, step: mask_pairs(60, 0.5, seed, step),
    "rollouts": lambda *path: draw_seed(*path, 3, 1),
    "places": lambda *path: draw_seed(3, 1, *path)}


@pytest.mark.parametrize("name", DRAWN)
def test_what_is_drawn_goes_by_each_number_in_its_place(name):
    drawn = DRAWN[name]
    paths = [(1, 2), (2, 1), (1, 1), (2, 2), (1, 0), (0, 1)]
    found = [drawn(*path) for path in paths]
    assert found == [drawn(*path) for path in paths]
    for number, one in enumerate(found):
        assert one not in found[:number], paths[number]


def plans(stage, model, world_dir, seed):
    """Of each step of a stage the videos in their places, and whether their CoTs are masked."""
    args = stage.Args(seed=seed, batch_size=4)
    read = read_pairs(world_dir / "train_cots.jsonl")
    found = []
    for updates in stage.make_plan(args, read, model.processor, ALONE)[:6]:
        planned = [one for micro_batches in updates for micro in micro_batches for one in micro]
        planned.sort(key=lambda one: one.place)
        found.append([(one.item.video_a, one.item.cot_a is None) for one in planned])
    return found


@pytest.mark.parametrize("stage", [coldstart, rl])
def test_a_stage_takes_its_pairs_and_masks_by_its_seed(stage, model, world_dir):
    first, again, other = (plans(stage, model, world_dir, seed) for seed in (5, 5, 6))
    assert first == again
    orders, masks = ([[[pair[part] for pair in step] for step in plan] for plan in (first, other)]
                     for part in (0, 1))
    assert orders[0] != orders[1]
    assert (masks[0] != masks[1]) == (stage is coldstart)
    if stage is coldstart:
        assert len({tuple(step) for step in masks[0]}) > 2  # each step draws its own


# ------------------------------------------------------------------------------------------------------------
# Runs in which nothing moves, on videos that are all the same: whatever differs was drawn


@pytest.fixture(scope="module")
def copies(world_dir, tmp_path_factory):
    """A folder with one video under four names, and files of pairs of them."""
    folder = tmp_path_factory.mktemp("copies")
    row = lines_of(world_dir / "train_cots.jsonl")[0] | {"prompt": PROMPT, "preference": "A"}
    row["scores_b"] = row["scores_a"]
    row["cot_b"] = row["cot_a"]
    for name in NAMES:
        shutil.copy(world_dir / row["video_a"], folder / name)
    two = [row | {"video_a": "a.mp4", "video_b": "b.mp4"}, row | {"video_a": "c.mp4", "video_b": "d.mp4"}]
    for name, some in (("train", two), ("test", two[:1])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in some))
    return folder


def weights(folder):
    return load_file(folder / "adapter_model.safetensors") | load_file(folder / "descore.safetensors")


class Runs:
    """Of stage 2 from the backbone with seed 5, on one rank and on two, and from there with seed 6; of
    stage 1 from the backbone with seed 5."""

    def __init__(self, copies, folder):
        self.one = folder / "one"
        self.two = folder / "two"
        self.other = folder / "other"
        self.stage1 = folder / "stage1"
        common = [*TOY_VIDEO, "--lora-rank", RANK, "--workers", 0, "--lr", 0, "--no-gradient-checkpointing",
                  "--train", copies / "train.jsonl", "--batch-size", 2]
        test = ["--test", copies / "test.jsonl", "--eval-temperature", HOT, "--max-new-tokens", 12]
        stage2 = ["rl.py", *common, *test, "--steps", 2, "--updates", 1, "--group-size", 3,
                  "--temperature", HOT, "--keep-rollouts", 9]
        backbone = ["--model", ROOT / "toy/backbone", "--seed", 5]
        run(*stage2, *backbone, "--out", self.one)
        run_ranks(2, *stage2, *backbone, "--out", self.two)
        run(*stage2, "--model", self.one, "--seed", 6, "--out", self.other)
        run("coldstart.py", *common, *backbone, "--epochs", 1, "--out", self.stage1, "--eval-before", "false")


@pytest.fixture(scope="module")
def runs(copies, tmp_path_factory):
    return Runs(copies, tmp_path_factory.mktemp("runs"))


def rollouts(out):
    """The CoTs of each group, by step and video."""
    found = {}
    for record in lines_of(out / "rollouts.jsonl"):
        found[record["step"], record["video"]] = [rollout["cot"] for rollout in record["rollouts"]]
    return found


def test_rollouts_go_by_seed_step_place_side_and_number(runs):
    groups = list(rollouts(runs.one).values())
    assert len(groups) == 2 * 2 * 2  # steps, places, sides
    for number, group in enumerate(groups):
        assert len(set(group)) == 3
        assert group not in groups[:number]
    assert not [group for group in rollouts(runs.other).values() if group in groups]


def test_rollouts_are_the_same_on_any_number_of_ranks_and_in_any_company(runs):
    assert rollouts(runs.two) == rollouts(runs.one)  # each rank has one pair


def test_evaluations_draw_the_same_at_each_step_and_with_each_seed(runs):
    first, second = lines_of(runs.one / "held_out.jsonl")[:2]
    assert first["step"] == second["step"] == 0 and first["cot"] != second["cot"]
    expected = [first["cot"], second["cot"]] * 2  # before the first step, and after the last
    for out in (runs.one, runs.two, runs.other):
        records = lines_of(out / "held_out.jsonl")
        assert [record["step"] for record in records] == [0, 0, 2, 2]
        assert [record["cot"] for record in records] == expected


def start(seed):
    """The start of what trains, by its name in a saved model."""
    torch.manual_seed(seed)
    model = DeScore.load(ROOT / "toy/backbone", device="cpu")
    model.set_trainable(RANK)
    found = {}
    for name, parameter in model.trainable().items():
        found[name.removeprefix("backbone.").replace(".default", "")] = parameter.detach()
    return found


def test_lora_query_and_head_start_by_the_seed_in_both_stages(runs):
    first, other = start(5), start(6)
    for out in (runs.one, runs.two, runs.stage1):
        found = weights(out / "model")
        for name, weight in found.items():
            if "merger" not in name:
                assert torch.equal(weight, first[name]), (out, name)
                assert torch.equal(weight, other[name]) == ("lora_B" in name), name


def test_what_is_loaded_is_drawn_by_no_seed(runs):
    before, after = weights(runs.one / "model"), weights(runs.other / "model")
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


# ------------------------------------------------------------------------------------------------------------
# Commands, in this process, each with one and the same model


@pytest.fixture(scope="module")
def scorer():
    torch.manual_seed(0)
    model = DeScore.load(ROOT / "toy/backbone", device="cpu")
    model.has_head = True
    return model


@pytest.fixture
def call(scorer, copies, tmp_path, monkeypatch, capsys):
    """Call a command's main with a seed; returns what it printed, and the file that it may have written."""
    monkeypatch.setattr(DeScore, "load", lambda *args, **options: scorer)
    monkeypatch.chdir(copies)
    numbers = iter(range(99))

    def called(main, seed, *words):
        out = tmp_path / f"{next(numbers)}.jsonl"
        words = [out if word == "OUT" else word for word in words]
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words), "--seed", str(seed)])
        try:
            main()
        except SystemExit as ended:
            assert not ended.code, capsys.readouterr().err
        return capsys.readouterr().out, out

    return called


def infer_pairs(call, seed):
    _, out = call(infer.main, seed, "--pairs", "train.jsonl", "--out", "OUT", *THINK)
    return [record["cot"] for record in lines_of(out)[1:]]


def infer_videos(call, seed):
    said, _ = call(infer.main, seed, *NAMES, PROMPT, "--json", *THINK)
    return [record["cot"] for record in sorted(json.loads(said), key=lambda record: record["video"])]


def make_pairs(call, seed):
    Path("videos.jsonl").write_text(json.dumps({"prompt": PROMPT, "videos": NAMES}) + "\n")
    _, out = call(pairs.main, seed, "videos.jsonl", "OUT", *THINK)
    return [record["cot"] for record in lines_of(out.with_name(out.name + ".judged"))[1:]]


def annotated(call, seed):
    _, out = call(annotate.main, seed, "train.jsonl", "OUT", *THINK)
    return [record[f"cot_{side}"] for record in lines_of(out) for side in "ab"]




@pytest.mark.parametrize("cots_of", [infer_pairs, infer_videos, make_pairs, annotated])
def test_a_command_draws_by_its_seed_and_the_number_of_the_video(cots_of, call):
    first, again, other = (cots_of(call, seed) for seed in (5, 5, 6))
    assert first == again
    assert len(set(first + other)) == 2 * len(NAMES)


def test_the_server_draws_by_its_seed_and_the_video(call, monkeypatch):
    FastAPI = pytest.importorskip("fastapi").FastAPI
    serving = pytest.importorskip("tools.serve")
    scorers = []
    monkeypatch.setattr(serving, "Service", lambda score, *_: scorers.append(score))
    monkeypatch.setattr(serving, "make_app", lambda *_: FastAPI())
    monkeypatch.setattr(serving.Server, "run", lambda self, sockets: sockets[0].close())
    monkeypatch.setattr(serving.Server, "leave", lambda self, status: None)
    found = []
    for seed in (5, 5, 6):
        call(serving.main, seed, *THINK, "--port", 0)
        asked = [(NAMES[1], PROMPT), (NAMES[0], "Another."), (NAMES[0], PROMPT)]
        records = [scorers[-1]([video], [prompt]) for video, prompt in asked]
        records.append(scorers[-1](*map(list, zip(*asked[::-1]))))
        found.append([record["cot"] for some in records for record in some])
    first, again, other = found
    assert first == again
    assert first[:3] == first[:2:-1]  # in any order, and in company
    assert len({*first, *other}) == 2 * 3


def test_the_probe_draws_its_pairs_other_prompts_and_cots_by_its_seed(call, world_dir, monkeypatch):
    scores = []
    for seed in (5, 5, 6):
        said, _ = call(probe.main, seed, "test.jsonl", "--json", "--samples", 1, *THINK)
        scores.append(json.loads(said)["std"])
    assert scores[0] == scores[1] != scores[2]
    asked = []

    def shown(model, keys, others, thinking, ranks):
        asked.append((keys, others))
        sys.exit()

    monkeypatch.setattr(probe, "shown", shown)
    for words in ([], ["--limit", 2]):
        for seed in (5, 5, 6):
            call(probe.main, seed, world_dir / "test_id.jsonl", "--model", "a", *words)
    assert asked[0] == asked[1] and asked[3] == asked[4]
    assert asked[0][1] != asked[2][1]  # other prompts
    assert asked[3][0] != asked[5][0]  # pairs


def test_annotate_together_tosses_its_coins_by_its_seed(call, monkeypatch):
    pytest.importorskip("httpx2")
    asked = []
    monkeypatch.setattr(annotate, "b_comes_first", lambda seed, *pair: asked.append((seed, pair)))
    monkeypatch.setattr(annotate.PairApi, "answer", lambda self, videos, prompt: {"error": "none"})
    with pytest.raises(annotate.DataError):
        call(annotate.main, 7, "train.jsonl", "OUT", "--api", "http://localhost:9", "--api-model", "x",
             "--together", "--scores")
    assert sorted(asked) == [(7, (NAMES[0], NAMES[1], PROMPT)), (7, (NAMES[2], NAMES[3], PROMPT))]


def test_the_embedded_data_are_prepared_with_one_seed(call, monkeypatch):
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **how: commands.append(command))
    call(prepare.main, 7, "OUT")
    seeded = [command for command in commands if "--seed" in command]
    assert ["world" in command[1] for command in seeded] == [True, False]  # then annotate
    assert all(command[command.index("--seed") + 1] == "7" for command in seeded)


def test_no_two_pairs_of_the_toy_world_are_drawn_alike(world_dir):
    """Not even those of the same number in two splits."""
    drawn = []
    for split in world.SPLITS:
        for row in lines_of(world_dir / f"{split}.jsonl"):
            drawn.append({name: value for name, value in row.items() if name not in ("video_a", "video_b")})
    for number, one in enumerate(drawn):
        assert one not in drawn[:number]


def test_thinking_without_seeds_draws_from_torchs_own_generator(scorer, copies):
    processor = scorer.processor
    batch = processor.collate([processor(str(copies / name), PROMPT) for name in NAMES[:2]])
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        tokens = [scorer.think(batch, 2, 12, HOT).tokens for _ in range(2)]
        found.append([processor.decode(one) for some in tokens for one in some.flatten(0, 1)])
    first, again, other = found
    assert first == again
    assert len(set(first + other)) == 2 * 2 * 2 * 2  # seeds, calls, videos, CoTs
