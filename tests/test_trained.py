"""The embedded model, toy/trained: it judges right after installing, says whose judgement that is, and does
as well as it claims."""

import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace

import pytest
from conftest import ROOT
from launch import run

from model import DeScore
from support.files import TOY, default_model
from support.ranks import ALONE
from support.run import prepare

NOTE = "the toy judges: a tiny embedded model that knows the toy's world alone"
CLAIMS = json.loads((ROOT / "toy/trained/claims.json").read_text())
CLIP = CLAIMS["clip"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The project as it was just cloned, elsewhere: no stage has run in it."""
    root = tmp_path_factory.mktemp("elsewhere") / "clone"
    for folder in ("support", "tools", "toy"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, root)
    return root


def files_of(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path: path.stat().st_mtime_ns for path in files}


def as_claimed(record):
    assert record["note"] == NOTE and record["cot"] == CLIP["cot"]
    assert record["score"] == pytest.approx(CLIP["score"], abs=1e-2)
    assert record["standardised"] == pytest.approx(CLIP["standardised"], abs=1e-2)
    return True


def test_right_after_installing_a_clip_is_judged_and_it_is_said_that_the_toy_judges(clone):
    done = run("infer.py", "toy/clip.mp4", CLIP["prompt"], "--json", root=clone)
    assert as_claimed(json.loads(done.stdout))
    assert done.stderr == f"{clone}/toy/trained: {NOTE}\n"


def test_of_several_videos_each_record_says_it(clone, world_dir):
    (clone / "other.mp4").write_bytes((world_dir / "videos/train_00000_a.mp4").read_bytes())
    videos = ("other.mp4", "toy/clip.mp4")
    ranked = json.loads(run("infer.py", *videos, CLIP["prompt"], "--json", "--cot", "off", root=clone).stdout)
    assert [record["note"] for record in ranked] == [NOTE, NOTE]
    assert {record["video"] for record in ranked} == set(videos)


def test_a_scorer_of_no_model_in_any_folder_is_the_toys_and_writes_nothing(clone, tmp_path):
    script = clone / "ask.py"
    script.write_text(f"import json, os\nos.chdir({str(tmp_path)!r})\nfrom infer import Scorer\n"
                      f"print(json.dumps(Scorer()({str(clone / 'toy/clip.mp4')!r}, {CLIP['prompt']!r})))")
    before = files_of(clone)
    done = run(script, root=clone)
    (record,) = json.loads(done.stdout)
    assert as_claimed(record) and NOTE in done.stderr
    assert files_of(clone) == before and not files_of(tmp_path)


OTHERS = [["infer.py", "--pairs", "pairs.jsonl"], ["-m", "tools.serve", "--port", "0"],
          ["-m", "tools.pairs", "videos.jsonl", "out.jsonl"], ["-m", "tools.probe", "pairs.jsonl"]]


@pytest.mark.slow
@pytest.mark.parametrize("command", OTHERS, ids=" ".join)
def test_what_judges_more_wants_a_model(command, clone):
    videos = {"prompt": "a cat", "videos": ["toy/clip.mp4", "other.mp4"]}
    shutil.copy(clone / "toy/clip.mp4", clone / "other.mp4")
    (clone / "videos.jsonl").write_text(json.dumps(videos) + "\n")  # which tools.pairs reads first
    done = subprocess.run([sys.executable, *command], cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.endswith("or pass --model\n")


def test_what_the_stages_left_comes_before_the_toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_model(or_toy=True) == str(TOY)
    (tmp_path / "runs/demo/coldstart/model").mkdir(parents=True)
    assert default_model(or_toy=True) == "runs/demo/coldstart"


def test_a_model_that_is_trained_from_the_toy_is_not_the_toy():
    model = DeScore.load(TOY, device="cpu")
    assert model.info["note"] == NOTE
    prepare(model, Namespace(gradient_checkpointing=False, shard=None, optim="adamw", max_tokens=1), ALONE)
    assert "note" not in model.info


def texts_in(value):
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_in(part)
    elif isinstance(value, str):
        yield value


def test_it_is_small_and_names_no_place_of_a_machine():
    files = list(TOY.iterdir())
    assert sum(path.stat().st_size for path in files) <= 2_000_000
    assert (ROOT / "toy/clip.mp4").stat().st_size <= 50_000
    assert not any(path.name.startswith("model") for path in files)  # the backbone's are toy/backbone
    for path in files:
        if path.suffix == ".json":
            for text in texts_in(json.loads(path.read_text())):
                assert not re.match(r"/\w|~|[A-Z]:", text), (path, text)
    assert json.loads((TOY / "descore.json").read_text())["backbone"] == "../backbone"


# ------------------------------------------------------------------------------------------------------------
# What it claims, and what the README shows


def test_the_readme_shows_what_its_command_prints():
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## ")[2].partition("\n## ")[0]
    assert f'\n    python infer.py toy/clip.mp4 "{CLIP["prompt"]}"\n' in section
    shown = "".join(re.findall(r"^> `(.*?)`", section, re.MULTILINE))
    assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", CLIP["cot"])
    score = f"{CLIP['score']:.2f}".replace("-", "−")
    assert f"**score {score}**, {abs(CLIP['standardised']):.2f} standard deviations" in section


def test_it_claims_to_be_better_than_a_coin():
    low, high = CLAIMS["interval"]
    assert 0.5 < low < CLAIMS["accuracy"] < high
    assert 100 <= CLAIMS["decided"] <= CLAIMS["pairs"]


@pytest.mark.slow
def test_it_does_as_well_as_it_claims(tmp_path):
    """On held-out pairs, rendered anew; another machine's rounding may turn a thought or two."""
    run("toy/world.py", tmp_path, "--pairs", 0, "--test-pairs", CLAIMS["pairs"])
    python, *command = CLAIMS["measured_by"].split()
    assert python == "python"
    done = run(*(word.replace("runs/toy/held.jsonl", str(tmp_path / "test_id.jsonl")) for word in command))
    found = json.loads(done.stdout)
    for name in ("pairs", "accuracy", "accuracy_no_cot", "accuracy_reading", "quality", "format_rate"):
        assert found[name] == pytest.approx(CLAIMS[name], abs=0.02), name
