"""Ranks that were asked different things do not work together, and none waits in silence."""

import json
import os
import shutil
import socket
import time
from pathlib import Path

import pytest
from conftest import ROOT, TOY_VIDEO
from launch import Started, run
from safetensors.torch import load_file, save_file
from test_adapters import save_scorer

from data import DataError
from model import DeScore
from support import ranks
from support.files import digest
from support.ranks import Ranks


def environment(rank, port):
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port)}


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_scorer(tmp_path_factory.mktemp("scorer") / "model")


def change(folder, factor=1.0):
    """Let the query and head of a saved model be others, as if it had been saved so, wherever it lies."""
    path = folder / "descore.safetensors"
    weights = load_file(path)
    save_file({name: factor * tensor for name, tensor in weights.items()}, path)
    info = json.loads((folder / "descore.json").read_text())
    info["files"][path.name] = digest(path)
    info["backbone"] = str(ROOT / "toy/backbone")
    (folder / "descore.json").write_text(json.dumps(info))


def test_a_few_videos_need_no_ranks_whatever_the_environment_says(folder, world_dir, port):
    videos = sorted((world_dir / "videos").glob("*.mp4"))[:2]
    started = []
    for rank, video in enumerate(videos):
        command = ("infer.py", video, "a red circle", "--model", folder, "--max-new-tokens", 4, "--json")
        started.append(Started(*command, env=environment(rank, port)))
    for video, process in zip(videos, started):
        done = process.wait()
        assert done.returncode == 0 and str(video) in done.stdout and done.stdout.count('"score"') == 1


def test_what_is_missing_in_the_environment_is_named(folder, world_dir):
    command = ("infer.py", "--pairs", world_dir / "test_id.jsonl", "--model", folder)
    done = run(*command, env={"RANK": "0", "WORLD_SIZE": "2"}, check=False)
    assert done.returncode == 1
    assert done.stderr == ("error: RANK is set, and LOCAL_RANK, MASTER_ADDR, MASTER_PORT not: start it by "
                           "torchrun, or unset RANK to run it alone\n")


WRONG = {"RANK": ("", "two", "2", "-1"), "WORLD_SIZE": ("0", "x"), "MASTER_PORT": ("x", "99999", "taken")}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]])
def test_what_makes_no_sense_in_the_environment_is_one_line(name, value, port, monkeypatch):
    monkeypatch.setattr(ranks, "QUIET", 1000)
    with socket.create_server(("localhost", port)):
        told = environment(0, port) | ({} if value == "taken" else {name: value})
        for known, text in told.items():
            monkeypatch.setenv(known, text)
        with pytest.raises(DataError, match="rank .*, waiting for the others at .* in vain") as found:
            Ranks.start()
    assert "\n" not in str(found.value)


COMMANDS = {
    "infer.py": ["infer.py", "--pairs", "test_id.jsonl", "--seed"],
    "tools.probe": ["-m", "tools.probe", "test_id.jsonl", "--seed"],
    "coldstart.py": ["coldstart.py", "--train", "train_cots.jsonl", "--out", "OUT", *TOY_VIDEO,
                     "--lora-rank", "4", "--seed"],
}


@pytest.mark.parametrize("name", [*list(COMMANDS)[:1], *[
    pytest.param(name, marks=pytest.mark.slow) for name in list(COMMANDS)[1:]]])
def test_ranks_that_were_asked_different_things_end(name, folder, world_dir, port, tmp_path):
    command = [str(world_dir / part) if part.endswith("jsonl") else part for part in COMMANDS[name]]
    command = [str(tmp_path / part) if part == "OUT" else part for part in command]
    roots = [ROOT, ROOT]
    differ = ""
    if name == "infer.py":  # with another model under its name, as on another machine
        command[0] = ROOT / name
        roots = [tmp_path / "0", tmp_path / "1"]
        for root in roots:
            shutil.copytree(folder, root / "m")
        change(roots[0] / "m")
        change(roots[1] / "m", -1.0)
        folder = "m"
        differ = ", the model m differ"
    started = [Started(*command, seed, "--model", folder, env=environment(rank, port), root=roots[rank])
               for rank, seed in enumerate((0, 1))]
    for process in started:
        done = process.wait()
        assert done.returncode == 1
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert errors[-1].startswith("error: rank 1 is asked about something else than rank 0: --seed")
        assert errors[-1].endswith(differ)


@pytest.mark.slow
def test_ranks_that_begin_from_other_models_do_not_train(folder, world_dir, port, tmp_path):
    started = []
    for rank, factor in enumerate((1.0, -1.0)):
        root = tmp_path / str(rank)
        shutil.copytree(folder, root / "m")
        change(root / "m", factor)
        started.append(Started(
            ROOT / "coldstart.py", "--train", world_dir / "train_cots.jsonl", "--out", tmp_path / "run",
            *TOY_VIDEO, "--lora-rank", 4, "--model", "m", "--no-eval-before", "--workers", 0,
            env=environment(rank, port), root=root))
    for rank, process in enumerate(started):
        done = process.wait()
        said = f"error: ranks {rank} and {1 - rank} have not the same: the model it began from (m)"
        assert done.returncode == 1 and said in done.stderr.splitlines()
    assert not (tmp_path / "run/metrics.jsonl").exists()


class Two(Ranks):
    """Rank 0 of two, of which the other says `other`."""

    other: dict

    def gather(self, mine):
        Two.seen = mine[0]
        return [*mine, Two.other]


def test_ranks_that_see_other_files_are_named(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("one")
    video = tmp_path / "a.mp4"
    video.write_bytes(b"short")
    keys = [(str(video), "p"), (str(tmp_path / "none.mp4"), "p")]
    ranks = Two(0, 2)
    Two.other = {}

    def differing():
        with pytest.raises(DataError) as found:
            ranks.agree({"seed": 0}, file, keys)
        return str(found.value).partition("rank 0: ")[2]

    differing()
    Two.other = Two.seen
    ranks.agree({"seed": 0}, file, keys)  # the same
    file.write_text("two")
    assert differing() == f"{file} differ"
    file.write_text("one")
    video.write_bytes(b"longer")
    assert differing() == "the videos differ"
    Path(keys[1][0]).write_bytes(b"")
    video.write_bytes(b"short")
    assert differing() == "the videos differ"


def test_ranks_that_have_another_model_are_named(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("one")
    ranks = Two(0, 2)
    model = DeScore.load(save_scorer(tmp_path / "m"), device="cpu")
    Two.other = {}
    with pytest.raises(DataError):
        ranks.agree({}, file, [], model)
    Two.other = Two.seen
    ranks.agree({}, file, [], model)  # the same
    model.processor.set_instruction("<video><prompt>")
    with pytest.raises(DataError, match="rank 0: the instruction differ$"):
        ranks.agree({}, file, [], model)
    change(tmp_path / "m", -1.0)
    other = DeScore.load(tmp_path / "m", device="cpu")
    with pytest.raises(DataError, match=f"rank 0: the model {tmp_path / 'm'} differ$"):
        ranks.agree({}, file, [], other)


def test_a_rank_says_for_whom_it_waits(folder, world_dir, port, tmp_path):
    script = tmp_path / "impatient.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport infer\nimport support.ranks\n"
                      "support.ranks.QUIET = 0.2\ninfer.main()\n")
    command = (script, "--pairs", world_dir / "test_id.jsonl", "--model", folder)
    process = Started(*command, env=environment(0, port))
    wanted = f"rank 0 of 2, waiting for the others at localhost:{port}\n"
    try:
        for _ in range(600):
            if wanted in Path(process.files[1]).read_text():
                break
            time.sleep(0.1)
        else:
            raise AssertionError("it waits in silence")
    finally:
        process.kill()
        process.process.join()
        for path in process.files:
            os.unlink(path)
