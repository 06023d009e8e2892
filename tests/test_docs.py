"""What README, docs/ and CONTRIBUTING say can be done, can be done: each command is run, or its flags are
parsed; names, files and links are there."""

import argparse
import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
from functools import cache

import pytest
import torch
import yaml
from conftest import ROOT
from launch import run
from torch.distributed.run import get_args_parser

import coldstart
import infer
import rl
from data import read_pairs
from model import DeScore
from support.settings import parse_args

DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", *DOCS]
BESIDE = ["presets/README.md", "bench/README.md", "experiments/RESULTS.md"]  # what they show takes long
STAGES = {"coldstart.py": coldstart, "rl.py": rl}
PROGRAMS = ("python", ".venv/bin/python", "torchrun", "make", "pip", "vllm")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def commands(page):
    """The commands that a page shows: indented lines that begin with a program, whole, and those in its
    prose. Comments, and variables that are set for one command, are cut off."""
    shown = re.sub(r"\\\n\s*", "", text_of(page))
    lines = re.findall(r"^ {4}(\S.*)$", shown, re.MULTILINE)
    if page != "docs/moved.md":  # tests/test_moved.py has its rows
        spans = re.findall(r"`((?:sudo )?(?:python|make) [^`]+)`", shown)
        lines += [span.replace("\n", " ") for span in spans]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and ("=" in words[0] or words[0] == "sudo"):
            del words[0]
        if words and words[0] in PROGRAMS:
            found.append(tuple(words))
    return list(dict.fromkeys(found))


ALL = [(page, command) for page in PAGES + BESIDE for command in commands(page)]
IDS = [f"{page}: {' '.join(command)[:60]}" for page, command in ALL]


# ------------------------------------------------------------------------------------------------------------
# Each command has a target, or a file and its flags


class Parsed(BaseException):
    """A command has read its flags."""


def read_flags(words, monkeypatch):
    """Let `python words…` read its flags and do nothing more."""
    real = argparse.ArgumentParser.parse_args

    def parse(self, *args, **kwargs):
        real(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(sys, "argv", list(words[words[0] == "-m":]))
    if words[0] in STAGES:
        parse_args(STAGES[words[0]].Args, words[0].removesuffix(".py"))
        return
    if words[0] == "infer.py":
        infer.parse_args()
        return
    file = ROOT / (words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0])
    assert file.is_file(), file
    if "argparse" not in file.read_text():
        assert len(words) == 1, f"{file} takes no flags"
        return
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed):
        if words[0] == "-m":
            importlib.import_module(words[1]).main()
        else:
            runpy.run_path(str(file), run_name="__main__")


@pytest.mark.parametrize(("page", "command"), ALL, ids=IDS)
def test_a_command_has_a_file_and_its_flags(page, command, monkeypatch, capsys, tmp_path):
    program, *words = command
    if program == "make":
        assert words and set(words) <= TARGETS
        return
    if program == "pip":
        assert words[:2] == ["install", "-r"] and (ROOT / words[2]).is_file()
        return
    if program == "vllm":  # tests/test_think_at.py starts it so
        return
    if program == "torchrun":
        asked = get_args_parser().parse_args(words)
        words = ["-m"] * asked.module + [asked.training_script, *asked.training_script_args]
    if "my.json" in words:  # which the page shows
        (content,) = re.findall(r'^ {4}(\{"rl": .*)$', text_of(page), re.MULTILINE)
        (tmp_path / "my.json").write_text(content)
        words[words.index("my.json")] = str(tmp_path / "my.json")
    if words[:2] == ["-m", "pytest"]:
        for word in words[2:]:
            assert not word.startswith("tests/") or (ROOT / word).is_file()
        return
    try:
        read_flags(words, monkeypatch)
    except SystemExit as end:
        assert end.code == 0 and "--help" in words, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES)
def test_what_is_indented_is_a_command_or_data(page):
    """So that no command is passed over."""
    shown = re.sub(r"\\\n\s*", "", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL))
    for line in re.findall(r"^ {4}(\S.*)$", shown, re.MULTILINE):
        word = re.sub(r"^(\w+=\S+ |sudo )+", "", line).split()[0]
        assert word in PROGRAMS or word[0] in '{"', line


# ------------------------------------------------------------------------------------------------------------
# What takes seconds is run

# Beginnings of commands that are run here, and what is added so that they are quick.
FEW = ["--max-new-tokens", "8"]
RUN = {
    "python infer.py": FEW,
    "python -m tools.check": ["--min-pixels", "4096", "--max-pixels", "4096"],
    "python -m tools.convert": [],
    "python -m tools.filter": [],
    "python -m tools.pairs": FEW,
    "python -m tools.probe": ["--limit", "1", *FEW],
    "python -m tools.report": [],
    "python bench/memory.py": [],
    "python bench/frames.py --check": [],
}
# Beginnings of commands whose flags alone are looked at, and why. These go before those above.
PARSED = {
    "make": "it is what runs this test, or takes minutes",
    "pip": "it needs a network",
    "torchrun": "it needs as many GPUs",
    "vllm": "it is another project's; tests/test_think_at.py starts it",
    "python coldstart.py": "it renders clips and trains on them; tests/test_stages.py runs it on few",
    "python rl.py": "it trains; tests/test_stages.py runs it on few pairs",
    "python -m tools.annotate": "it needs a hub or an endpoint; tests/test_formats.py has both",
    "python -m tools.serve": "tests/test_serve.py runs it",
    "python tests/kill.py": "it takes many minutes",
    "python toy/train.py": "it takes many minutes; tests/test_trained.py measures what it left",
    "python experiments/claims.py": "it takes hours",
    "python infer.py --think-at": "it needs an endpoint; tests/test_think_at.py has one",
    "python infer.py --pairs release-test.csv": "tests/test_formats.py runs it",
    ".venv/bin/python": "it is what runs this test",
}
TO_RUN = []
for page in PAGES:
    for command in commands(page):
        said = " ".join(command)
        if not said.startswith(tuple(PARSED)) and command not in TO_RUN:
            TO_RUN.append(command)


def test_every_command_is_run_or_it_is_said_why_not():
    every = [" ".join(command) for page in PAGES for command in commands(page)]
    for said in every:
        assert said.startswith((*RUN, *PARSED)), said
    for beginning in (*RUN, *PARSED):
        assert any(said.startswith(beginning) for said in every), f"no page has {beginning} …"


@pytest.fixture(scope="module")
def folder(world_dir, tmp_path_factory):
    """A folder in which the files are that the pages name: a few pairs, their clips, a model, a run."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "VIDEOS").mkdir()
    pairs = read_pairs(world_dir / "train_cots.jsonl")[:2]
    rows = ["path_A,path_B,A_model,B_model,prompt,TA\n"]
    votes = ["prompt,left_model,right_model,vote_type,left_video_path,right_video_path\n"]
    for number, pair in enumerate(pairs):
        names = [f"{number}{side}.mp4" for side in "ab"]
        for name, (video, _) in zip(names, pair.videos()):
            shutil.copy(video, folder / name)
            shutil.copy(video, folder / "VIDEOS")
            shutil.move(folder / "VIDEOS" / video.rpartition("/")[2], folder / "VIDEOS" / name)
        label = {"A": "A", "B": "B", "tie": "same"}[pair.preference]
        rows.append(f'{names[0]},{names[1]},x,y,"{pair.prompt}",{label}\n')
        vote = {"A": "leftvote", "B": "rightvote", "tie": "tievote"}[pair.preference]
        votes.append(f'"{pair.prompt}",x,y,{vote},{names[0]},{names[1]}\n')
    scores = ["video,score\n"]
    for number, pair in enumerate(pairs):
        scores += [f"{pair.video_a},{number}\n", f"{pair.video_b},0.5\n"]
    for name, content in (("pairs", rows), ("videogen-rewardbench", rows), ("genai-bench", votes),
                          ("other", scores)):
        (folder / f"{name}.csv").write_text("".join(content))
    lines = (world_dir / "train_cots.jsonl").read_text().splitlines(keepends=True)
    for name, count in (("test", 2), ("pairs", 3), ("annotated", 12), ("references", 12)):
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]))
    shutil.copytree(world_dir / "videos", folder / "videos")
    names = ["video.mp4", "a.mp4", "b.mp4", "c.mp4"]
    for name, clip in zip(names, sorted((folder / "videos").iterdir())):
        shutil.copy(clip, folder / name)
    prompts = [{"prompt": prompt, "videos": names[1:]} for prompt in ("A red circle.", "A blue cross.")]
    (folder / "VIDEOS.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    ratings = [f"{name},A red circle.,{number},2\n" for number, name in enumerate(names)]
    (folder / "ratings.csv").write_text("".join(["video,prompt,quality,alignment\n", *ratings]))
    (folder / "FILE").write_text("<video><prompt>\nThink, then judge.")
    torch.manual_seed(0)
    model = DeScore.load(ROOT / "toy/backbone", device="cpu")
    model.set_trainable(4)
    for name in ("CHECKPOINT", "runs/8b-rl/model", "runs/8b-rl/best", "runs/rl/model", "runs/demo/rl/model"):
        model.save(folder / name, score_mean=0.5, score_std=0.25)
    run_of = folder / "runs/rl"
    settings = {"stage": "rl", "steps": 2, "settings": {}, "dimensions": {"subject": 2},
                "tags": ["think", "answer"], "reward": {"rl.py:format_reward": 0.1}}
    (run_of / "settings.json").write_text(json.dumps(settings))
    steps = [{"step": step, "loss": 1 / step, "reward": 0.5, "seconds": 1.0} for step in (1, 2)]
    (run_of / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    return folder


OURS = re.compile(r"(VIDEOS|FILE|FOLDER|OUT|CHECKPOINT|runs|figures)($|/|\.jsonl)|.*\.(mp4|csv|jsonl|html)$")


@pytest.mark.parametrize("command", TO_RUN, ids=" ".join)
def test_a_command_runs(command, folder, monkeypatch):
    said = " ".join(command)
    (more,) = [more for beginning, more in RUN.items() if said.startswith(beginning)]
    words = []
    for word in command[1:]:
        ours = folder / word.replace("FOLDER", "VIDEOS")
        is_embedded = word.startswith("toy/")
        words.append(ours if OURS.match(word) and not is_embedded else word)
    if words[0] == "infer.py" and not {"--model", "toy/clip.mp4"} & set(command):
        words += ["--model", folder / "runs/rl"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = run(*words, *more)
    assert "Traceback" not in done.stderr
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert done.stdout or before != after  # it says or writes something


def test_the_readmes_python(folder, tmp_path):
    """Of the README; that of docs/in-a-trainer.md is run by tests/test_serve.py."""
    (code,) = re.findall(r"```python\n(.*?)```", text_of("README.md"), re.DOTALL)
    code = code.replace("runs/demo/rl", str(folder / "runs/demo/rl")).replace('"video.mp4"',
                                                                             f'"{folder}/video.mp4"')
    few = "fps=16, max_new_tokens=8, accept_any=True"  # which no CoT ends within
    code = code.replace(")]):", ')], max_new_tokens=8):').replace("fps=16):", f"{few}):", 1)
    given = "import torch\nframes, prompts = torch.rand(1, 8, 3, 64, 64), ['a red circle']\n"
    again = f"assert scorer(frames, prompts, {few})[0]['score'] == record['score']\n"
    (tmp_path / "readme.py").write_text(given + code + again)
    judged, *_, rewarded = run(tmp_path / "readme.py").stdout.splitlines()
    assert "'score': " in judged and "'cot': " in judged and rewarded.endswith(" None")


# ------------------------------------------------------------------------------------------------------------
# Names, files and links are there

PROJECT = [ROOT / f"{name}.py" for name in ("data", "model", "coldstart", "rl", "infer")]


@pytest.mark.parametrize("page", [*PAGES, *BESIDE])
def test_links_and_files_are_there(page):
    here = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            assert (here / file).exists(), link
            if anchor:
                titles = re.findall(r"^#+ (.*)$", (here / file).read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
    if page == "docs/moved.md":  # half of which is gone
        return
    rooms = "support|tools|presets|toy|experiments|bench|tests|docs"
    for file in re.findall(rf"`((?:{rooms})/[\w./-]*)`", text_of(page)):
        assert (ROOT / file).exists() or (ROOT / page).parent.joinpath(file).exists(), file


def test_functions_that_the_readme_names_are_there():
    defined = "".join(path.read_text() for path in PROJECT)
    for row in re.findall(r"^\| .*$", text_of("README.md"), re.MULTILINE):
        for name in re.findall(r"`([A-Za-z_.]+)(?:\(\))?`", row):
            owner, _, attribute = name.rpartition(".")
            if attribute == "py":
                assert (ROOT / name).is_file(), name
            elif owner in ("data", "model", "coldstart", "rl", "infer"):
                assert hasattr(importlib.import_module(owner), attribute), name
            elif owner == "DeScore":
                assert hasattr(DeScore, attribute), name
            elif not owner:
                assert re.search(rf"^ *def {name}\(|^{name} = |\b{name}=", defined, re.MULTILINE), name


@pytest.mark.house
def test_the_readme_is_read_in_one_sitting():
    lines = text_of("README.md").splitlines()
    assert len(text_of("README.md").split()) <= 1500
    assert max(map(len, lines)) <= 100


# ------------------------------------------------------------------------------------------------------------
# What runs the tests elsewhere


def test_the_workflow_runs_targets_of_the_makefile():
    (job,) = yaml.safe_load(text_of(".github/workflows/test.yml"))["jobs"].values()
    run_lines = [step["run"] for step in job["steps"] if "run" in step]
    assert run_lines == ["make test"] and "test" in TARGETS
    matrix = job["strategy"]["matrix"]
    assert {system.partition("-")[0] for system in matrix["os"]} == {"ubuntu", "macos"}
    assert min(matrix["python"]) == "3.11" and all(isinstance(version, str) for version in matrix["python"])
    assert job["runs-on"] == "${{ matrix.os }}" and "badge" not in text_of("README.md")
