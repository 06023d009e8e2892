import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in two processes side by side

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy"), str(ROOT / "bench"), str(ROOT / "experiments")]

from launch import run

from model import DeScore
from tools.release import Release

# The files that take longest, the longest first.
LONGEST = ["test_runs", "test_stages", "test_steps", "test_flags", "test_hackable", "test_loop"]

TOY_VIDEO = ["--min-pixels", "4096", "--max-pixels", "4096"]


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that no process is left with one while the other idles."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_terminal_summary(terminalreporter):
    """Say at the end under which settings the tests ran, for rounding depends on them."""
    capability = torch.backends.cpu.get_cpu_capability()
    onednn = os.environ.get("ONEDNN_MAX_CPU_ISA", "not set")
    terminalreporter.write_line(f"threads {torch.get_num_threads()}, capability {capability}, "
                                f"ONEDNN_MAX_CPU_ISA {onednn}")


@pytest.fixture(scope="session")
def world_dir(tmp_path_factory):
    """A few rendered pairs, and a train file whose CoTs are made from the truth."""
    folder = tmp_path_factory.mktemp("world")
    run(ROOT / "toy/world.py", folder, "--pairs", 12, "--test-pairs", 4, "--seed", 3)
    lines = []
    for line in (folder / "train.jsonl").read_text().splitlines():
        pair = json.loads(line)
        for side in "ab":
            answer = json.dumps({"dimensional_scores": pair[f"scores_{side}"]})
            pair[f"cot_{side}"] = f"<think>\nsubject: seen\n</think>\n<answer>\n{answer}\n</answer>"
        lines.append(json.dumps(pair) + "\n")
    (folder / "train_cots.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def model():
    """The embedded backbone in float64, with a query and a head that do something."""
    torch.manual_seed(0)
    model = DeScore.load(ROOT / "toy/backbone", dtype=torch.float64, device="cpu").double()
    model.has_head = True
    return model


def plain_head(h, weights):
    """r of the last hidden state h (H,) behind [Reward], by the weights of the head by name: calculated
    plainly, here alone. A fork with another head writes this function anew."""
    return h @ weights["head.weight"][0]


def in_layout(model, layout):
    """The same model, which scores in our layout or the release's."""
    model.__class__ = {"ours": DeScore, "release": Release}[layout]
    model.info["scoring_layout"] = layout
    return model


@pytest.fixture(scope="session")
def keys(world_dir):
    """(video, prompt) keys whose prompts differ in length."""
    lines = (world_dir / "train.jsonl").read_text().splitlines()[:3]
    pairs = [json.loads(line) for line in lines]
    return [(str(world_dir / pair["video_a"]), pair["prompt"]) for pair in pairs]
