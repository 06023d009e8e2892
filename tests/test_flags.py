"""Every flag of every command does what its help says: the table of tests/flags.py, run and looked at."""

import argparse
import csv
import json
import re
import runpy
import shlex
import shutil
import sys
from functools import cache

import pytest
import torch
from conftest import ROOT
from flag_looks import Done
from flags import RUNS, SLOW_RUNS, TABLE, Named, Pinned, Row
from launch import run, run_ranks
from transformers import AutoTokenizer

from data import Processor, VideoSettings
from model import DeScore

ASK = "Watch this: <video> It was asked for by: <prompt> Judge it."
ROWS = [(command, row) for command, rows in TABLE.items() for row in rows if isinstance(row, Row)]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


# ------------------------------------------------------------------------------------------------------------
# What the runs are about


@pytest.fixture(scope="module")
def data(world_dir, tmp_path_factory):
    """The inputs of the runs, and what is known of them."""
    folder = tmp_path_factory.mktemp("flags")
    train = lines(world_dir / "train_cots.jsonl")[:4]
    tests = lines(world_dir / "test_id.jsonl")
    # Of the two columns of labels one is the other's opposite.
    rows = [{"path_A": pair["video_a"], "path_B": pair["video_b"], "prompt": pair["prompt"], "VQ": label,
             "MQ": "A", "TA": "AB".replace(label, "")} for pair, label in zip(tests[1:], "ABA")]
    write_pairs(folder, world_dir, train, tests, rows)
    model = save_model(folder / "model")
    asked = Processor(AutoTokenizer.from_pretrained(ROOT / "toy/backbone"),
                      VideoSettings(1.0, min_pixels=9000, patch_size=8), ASK)
    lengths = {}
    for pair in train:
        videos = tuple(str(world_dir / pair[f"video_{side}"]) for side in "ab")
        lengths[videos] = max(len(asked(video, pair["prompt"]).input_ids) for video in videos)
    by_letters = Processor(AutoTokenizer.from_pretrained(save_letters(folder / "letters")),
                           VideoSettings(1.0, min_pixels=9000, max_pixels=448 * 448))
    letters = [len(by_letters(str(world_dir / row[side]), row["prompt"]).input_ids)
               for row in rows for side in ("path_A", "path_B")]
    return {
        "data": folder, "world": world_dir, "backbone": ROOT / "toy/backbone",
        "rows": rows, "listed": [str(world_dir / row[side]) for row in rows for side in ("path_A", "path_B")],
        "letter_lengths": letters, "lengths": lengths, "max_prompt": sorted(lengths.values())[1],
        "tests": [lines(folder / f"{name}.jsonl")[0] for name in ("test_a", "test_b")],
        "whose": {video: number for number, videos in enumerate(lengths) for video in videos},
        "blocks": len(model.qwen.model.language_model.layers),
        "own": model.query.numel() + model.head.weight.numel()}


def write_pairs(folder, world_dir, train, tests, rows):
    """Pair files of every kind that the runs need. CoTs to train on differ in length."""
    for number, pair in enumerate(train):
        for side in "ab":
            pair[f"cot_{side}"] = "well, " * (number + 2 * (side == "b")) + pair[f"cot_{side}"]
    write(folder / "lists/train.jsonl", train)
    with (folder / "lists/test.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    sides = ("video_a", "video_b")
    for name, pairs in (("train", train), ("test_a", tests[:1]), ("test_b", tests[1:2])):
        write(folder / f"{name}.jsonl", [
            pair | {side: str(world_dir / pair[side]) for side in sides} for pair in pairs])
    (folder / "ask.txt").write_text(ASK)
    both = lines(folder / "test_a.jsonl") + lines(folder / "test_b.jsonl")
    problem = "Is this so: {}? <video> Think, then answer."
    write(folder / "problems.jsonl", [pair | {"problem": problem.format(pair["prompt"])} for pair in both])
    write(folder / "groups.jsonl", [
        {"prompt": pair["prompt"], "videos": [pair[side] for side in sides]} for pair in both])
    write_otherwise(folder, lines(folder / "train.jsonl"))


def save_model(folder):
    """A model in which nothing is zero."""
    torch.manual_seed(1)
    model = DeScore.load(ROOT / "toy/backbone", device="cpu")
    model.set_trainable(4)
    for name, parameter in model.trainable().items():
        if "lora_B" in name or name == "query":
            parameter.data.normal_(std=0.1)
    model.save(folder, score_mean=0.5, score_std=2.0)
    return model


def save_letters(folder):
    """A tokenizer that never puts two letters together."""
    shutil.copytree(ROOT / "toy/backbone", folder)
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    return folder


def write_otherwise(folder, pairs):
    """Pairs whose CoTs imply the label, in tags and dimensions of their own; and what says so of a model. The
    thought says the contrary first, so that it must be told from the answer."""
    names = ("subject", "dynamics", "taste")
    for pair in pairs:
        for side in "ab":
            value = 2 if pair["preference"] == side.upper() else 0
            first, last = (json.dumps({"dimensional_scores": dict.fromkeys(names, some)})
                           for some in (2 - value, value))
            pair[f"cot_{side}"] = f"<reason>At first sight {first}</reason><verdict>{last}</verdict>"
            del pair[f"scores_{side}"]
    write(folder / "otherwise.jsonl", pairs)
    shutil.copytree(ROOT / "toy/backbone", folder / "other")
    info = json.loads((folder / "other/descore.json").read_text())
    info |= {"dimensions": dict.fromkeys(names, 1), "tags": ["reason", "verdict"]}
    (folder / "other/descore.json").write_text(json.dumps(info))


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """The runs by name; each is made when it is asked for, once."""

    @cache
    def get(name):
        out = tmp_path_factory.mktemp(name)
        places = {"data": data["data"], "world": data["world"], "out": out, "max_prompt": data["max_prompt"]}
        if "{run}" in RUNS[name]:
            places["run"] = get("rl-logs").out
        words = shlex.split(RUNS[name].format(**places))
        processes = 1
        if words[0].startswith("ranks="):
            processes = int(words.pop(0).removeprefix("ranks="))
        spied = ["tests/spied.py", out / "notes.json", *words]
        ended = [run(*spied)] if processes == 1 else run_ranks(processes, *spied)
        notes = [json.loads((out / f"notes.json{rank or ''}").read_text()) for rank in range(processes)]
        return Done(words, out, data, get, ended[0].stdout, notes)

    return get


def parameters():
    for command, row in ROWS:
        marks = [pytest.mark.slow] if row.run in SLOW_RUNS else []
        yield pytest.param(command, row, id=f"{command} {row.flag}", marks=marks)


@pytest.mark.parametrize(("command", "row"), parameters())
def test_a_flag_does_what_its_help_says(command, row, done):
    flags = row.flag.split()
    words = RUNS[row.run].split()
    starts = [place for place, word in enumerate(words) if words[place : place + len(flags)] == flags]
    assert starts, f"{row.run} does not have {row.flag}"
    assert command in RUNS[row.run]
    found, expected = row.look(done(row.run))
    assert found == expected, row.says


# ------------------------------------------------------------------------------------------------------------
# The table is complete


class Caught(BaseException):
    """A command has made its parser."""


def parser_of(command, monkeypatch):
    """The parser of a command, which does nothing more."""

    def keep(parser, *args, **kwargs):
        caught.append(parser)
        raise Caught

    caught = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", keep)
    monkeypatch.setattr(sys, "argv", command.replace("-m ", "").split())
    with pytest.raises(Caught):
        if command.startswith("-m "):
            runpy.run_module(command.split()[1], run_name="__main__")
        else:
            runpy.run_path(str(ROOT / command.split()[0]), run_name="__main__")
    monkeypatch.undo()
    return caught[0]


def commands():
    """Every file that reads flags, as it is started."""
    found = []
    for folder in ("", "tools", "toy", "experiments", "bench"):
        for path in sorted((ROOT / folder).glob("*.py")):
            text = path.read_text()
            if '__name__ == "__main__"' not in text or not re.search("argparse|parse_args", text):
                continue
            name = str(path.relative_to(ROOT))
            if folder == "tools":
                name = f"-m tools.{path.stem}"
            ways = re.search(r"for way in \((.*)\)\}", text)
            found += [f"{name} {way}" for way in ways[1].split(", ")] if ways else [name]
    return found


def test_the_table_has_every_command():
    assert set(commands()) == set(TABLE)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", commands())
def test_the_table_has_every_flag(command, monkeypatch):
    flags = set()
    for action in parser_of(command, monkeypatch)._actions:
        if not command.startswith(("toy/", "experiments/", "bench/")):
            assert action.type not in (int, float), f"{action.option_strings} has no range"
        flags |= {name.replace("_", "-") for name in action.option_strings if name.startswith("--")}
    assert {row.flag.split()[0] for row in TABLE.get(command, [])} == flags - {"--help"}


def test_what_is_pinned_elsewhere_is_there():
    for command, rows in TABLE.items():
        for row in rows:
            if isinstance(row, Pinned):
                file, name = row.test.split()
                text = (ROOT / "tests" / file).read_text()
                assert re.search(rf"^def {name}\(", text, re.MULTILINE), f"{command} {row.flag}: {row.test}"
            elif isinstance(row, Named):
                assert row.why
