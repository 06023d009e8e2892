"""The rooms of the house: the five and support/ are enough, and nothing leads upwards."""

import ast
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TOY_VIDEO
from launch import run

FIVE = ("model", "data", "coldstart", "rl", "infer")
QUICK = [*TOY_VIDEO, "--lora-rank", 4, "--workers", 0, "--batch-size", 2, "--max-new-tokens", 10]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The five and support/, and a backbone beside them."""
    root = tmp_path_factory.mktemp("alone")
    for name in FIVE:
        shutil.copy(ROOT / f"{name}.py", root)
    shutil.copytree(ROOT / "support", root / "support")
    shutil.copytree(ROOT / "toy/backbone", root / "qwen")
    return root


@pytest.fixture(scope="module")
def trained(alone, world_dir):
    """Both stages, trained there."""
    test = ["--test", world_dir / "test_id.jsonl"]
    run("coldstart.py", "--model", "qwen", "--train", world_dir / "train_cots.jsonl", "--epochs", 1, *test,
        *QUICK, root=alone)
    run("rl.py", "--train", world_dir / "train.jsonl", "--steps", 1, "--updates", 1, "--group-size", 2, *test,
        *QUICK, root=alone)
    return alone


def test_without_every_other_folder_both_stages_train_and_infer_judges(trained, world_dir):
    for stage in ("coldstart", "rl"):
        lines = (trained / f"runs/{stage}/metrics.jsonl").read_text().splitlines()
        assert "test_id/accuracy" in json.loads(lines[-1])
        assert json.loads((trained / f"runs/{stage}/model/descore.json").read_text())["stage"] == stage
    pair = json.loads((world_dir / "test_id.jsonl").read_text().splitlines()[0])
    videos = [world_dir / pair["video_a"], world_dir / pair["video_b"]]
    one = json.loads(run("infer.py", videos[0], pair["prompt"], "--json", *QUICK[-2:], root=trained).stdout)
    assert one["video"] == str(videos[0]) and isinstance(one["score"], float)
    ranked = run("infer.py", *videos, pair["prompt"], *QUICK[-2:], root=trained).stdout
    assert ranked.startswith("1. ") and "\n2. " in ranked
    figures = run("infer.py", "--pairs", world_dir / "test_id.jsonl", "--json", *QUICK[-2:], root=trained)
    assert {"accuracy", "intervals", "generators"} <= json.loads(figures.stdout).keys()


OFFERED = {
    "page": (["infer.py", "{video}", "p", "--report", "page.html"], "tools/report.py"),
    "judgements": (["infer.py", "--pairs", "{pairs}", "--out", "judged.jsonl"], "tools/journal.py"),
    "csv": (["infer.py", "--pairs", "{csv}"], "tools/formats.py"),
    "decord": (["infer.py", "{video}", "p", "--reader", "decord"], "tools/decord_reader.py"),
    "tracker": (["coldstart.py", "--model", "qwen", "--train", "{pairs}", "--log", "wandb", "--out", "x"],
                "tools/trackers.py"),
}


@pytest.mark.parametrize("offered", OFFERED)
def test_what_stands_above_is_missed_in_one_line(offered, trained, world_dir, tmp_path):
    (tmp_path / "pairs.csv").write_text("path_A,path_B,prompt,TA\na.mp4,b.mp4,p,A\n")
    pair = json.loads((world_dir / "test_id.jsonl").read_text().splitlines()[0])
    places = {"video": world_dir / pair["video_a"], "pairs": world_dir / "test_id.jsonl",
              "csv": tmp_path / "pairs.csv"}
    command, file = OFFERED[offered]
    done = run(*(str(word).format(**places) for word in command), root=trained, check=False)
    message = done.stderr.strip().splitlines()[-1]
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert f"in {file}, and this copy of the project has no such file: it needs the folder tools/" in message


def test_the_api_that_stands_above_is_missed_in_one_line(trained, tmp_path):
    (tmp_path / "ask.py").write_text("from infer import reward\n")
    (trained / "ask.py").write_text("from infer import reward\n")
    done = run("ask.py", root=trained, check=False)
    assert "reward is in tools/memory.py, and this copy" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("words", [["-m", "support.check", "x"], ["-c", "from support import client"]])
def test_an_old_name_says_what_it_needs(words, trained):
    done = subprocess.run([sys.executable, *words], check=False, cwd=trained, capture_output=True, text=True,
                          env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "it needs the folder tools/ too" in last
    assert ("Traceback" in done.stderr) == (words[0] == "-c")


# ------------------------------------------------------------------------------------------------------------
# Imports

# What each room may lead to, beside itself.
BELOW = {"five": {"support"}, "support": {"five"}, "tools": {"five", "support"},
         "presets": {"five", "support"}, "toy": {"five", "support", "tools"},
         "bench": {"five", "support", "tools", "toy"},
         "experiments": {"five", "support", "tools", "toy"}}


def room_of(path):
    folder = path.relative_to(ROOT).parts[0]
    return "five" if folder.endswith(".py") else folder


def imported_rooms(path, modules):
    """The rooms that a file's imports lead to, those within functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {room_of(modules[name]) for name in names & modules.keys()}


@pytest.mark.house
def test_no_import_points_upwards():
    files = [*ROOT.glob("*.py")]
    for folder in BELOW.keys() - {"five"}:
        files += (ROOT / folder).glob("*.py")
    modules = {}
    for path in files:
        modules[path.stem if room_of(path) in ("five", "toy", "bench", "experiments") else
                f"{path.parent.name}.{path.stem}"] = path
    assert len(modules) == len(files)
    for path in files:
        room = room_of(path)
        assert imported_rooms(path, modules) <= BELOW[room] | {room}, path
