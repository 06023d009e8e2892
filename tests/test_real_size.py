"""bench/real_size.py: shapes and checkpoints, what is refused and what is measured; and that loading and
saving hold no more than they have to."""

import json
import mmap
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import real_size
import torch
from conftest import ROOT
from memory import SHAPES, cpu_memory, peak
from transformers import Qwen3VLForConditionalGeneration

from data import DataError, read_pairs
from model import DeScore
from support import checkpoint, saved
from support.checkpoint import Checkpoints
from support.files import lock
from support.optimize import adamw
from support.ranks import ALONE

KNOWN = {"2b": 2_127_532_032, "4b": 4_437_815_808, "8b": 8_767_123_696}  # parameters of the real ones


@pytest.mark.parametrize("size", ["toy", *SHAPES])
def test_a_shape_has_as_many_parameters_as_it_says(size):
    shape = real_size.SHAPES[size]
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(real_size.config_of(shape))
    counts = {name: p.numel() for name, p in model.named_parameters()}
    tower = {name: count for name, count in counts.items() if ".visual." in name}
    assert sum(tower.values()) == shape.vision
    assert sum(count for name, count in tower.items() if "merger" in name) == shape.mergers
    norms = sum(count for name, count in counts.items() if "norm" in name and name not in tower)
    assert sum(counts.values()) == shape.total + norms == KNOWN.get(size, shape.total + norms)


def test_a_checkpoint_is_a_model_with_random_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(real_size, "GB", 2e5)  # a file holds 400 kB
    tokenizer = real_size.tokenizer_of("toy", tmp_path)
    real_size.write_checkpoint(real_size.SHAPES["toy"], tokenizer, tmp_path / "toy")
    assert len(list((tmp_path / "toy").glob("*.safetensors"))) > 2
    model = DeScore.load(tmp_path / "toy", device="cpu")
    matrices = [p for p in model.qwen.parameters() if p.ndim > 1]
    assert all(0.015 < p.std() < 0.025 for p in matrices)
    beginnings = {tuple(p.flatten()[:8].tolist()) for p in matrices}
    assert len(beginnings) == len(matrices)
    assert model.processor.video_id == model.qwen.config.video_token_id


def test_the_vocabulary_is_made_of_its_byte_pairs():
    letters = [bytes([byte]) for byte in range(256)]
    ranks = [*letters, b"th", b"the", b" a", b"er"]
    lines = b"".join(real_size.base64.b64encode(token) + b" 0\n" for token in ranks)
    tokenizer = real_size.make_tokenizer(lines)
    assert tokenizer.encode("the ather", add_special_tokens=False) == [257, 258, 257, 114]
    assert tokenizer.convert_tokens_to_ids("<|video_pad|>") == len(ranks) + real_size.SPECIAL.index(
        "<|video_pad|>") == len(ranks) + 13


def test_memory_without_mapped_files_is_told_from_what_is_resident(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 60_000_000)
    code = ("import mmap, time; f = open(r'%s', 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); "
            "n = sum(m[::4096]); b = b'y' * 90_000_000; time.sleep(0.4)" % (tmp_path / "file"))
    found = real_size.run(["-c", code], tmp_path / "log", bound=30)
    assert found["failed"] is None and mmap.PAGESIZE
    assert 0.09 < found["anonymous"] < 0.12 and 0.15 < found["resident"] < 0.19
    assert 0.4 < found["seconds"] < 20


def test_a_command_that_fails_or_takes_too_long_is_said_to(tmp_path):
    found = real_size.run(["-c", "import sys; sys.exit('no such thing')"], tmp_path / "log", bound=30)
    assert found["failed"] == "ended with 1: no such thing"
    found = real_size.run(["-c", "import time; time.sleep(60)"], tmp_path / "log", bound=0.1)
    assert found["failed"] == "not done within 0 s" and found["seconds"] < 10
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert real_size.run(["-c", killed], tmp_path / "log", bound=30)["failed"] == real_size.KILLED


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Run the script with toy cells, of which no command is run, and give its rows."""
    asked = []
    monkeypatch.setattr(real_size, "WAIT", 0)
    monkeypatch.setattr(real_size, "available", lambda: 6.0)
    monkeypatch.setattr(real_size, "whole_memory", lambda: 10.0)
    monkeypatch.setattr(real_size.Bench, "computed", lambda self, command: NEEDS[command])
    monkeypatch.setattr(real_size.Path, "write_text", noted(asked, real_size.Path.write_text))

    def measure(self, command, bound):
        assert self.backbone.is_dir()
        asked.append(command)
        figures = {"seconds": 1.0, "resident": 3.0, "anonymous": 2.0, "failed": None}
        if asked.count(command) == 1:
            figures["failed"] = real_size.KILLED
        return figures

    monkeypatch.setattr(real_size.Bench, "measure", measure)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["real_size.py", *words, "--out", str(tmp_path)])
        real_size.main()
        return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()], asked

    return run


NEEDS = {"load": 3.5, "coldstart": 4.5, "rl": 8.5, "infer": 3.0}


def noted(asked, real):
    def write(path, text, *more, **options):
        if str(path) == "/proc/self/oom_score_adj":  # of the tests themselves it stays as it is
            asked.append(text)
            return len(text)
        return real(path, text, *more, **options)

    return write


@pytest.mark.slow
def test_what_is_too_large_is_not_started(rows, tmp_path, capsys):
    found, asked = rows("toy", "--only", "4bit")
    states = {row["command"]: (row["state"], row["computed"]) for row in found}
    assert states == {"load": ("measured", 3.5), "coldstart": ("refused", 4.5), "rl": ("does not fit", 8.5),
                      "infer": ("measured", 3.0)}
    assert asked == ["1000", "load", "load", "infer", "infer"]  # once more where it was killed
    assert not (tmp_path / "real_size_cell").exists()
    assert "| toy | 4bit | lora | infer | 3.0 | 2.0 | 3.0 | 1 | – |  |" in capsys.readouterr().out


@pytest.mark.slow
def test_nothing_is_started_when_the_time_is_over(rows, monkeypatch):
    monkeypatch.setattr(real_size, "HOURS", -1)
    found, asked = rows("toy", "--only", "4bit")
    assert asked == ["1000"]
    assert [row["state"] for row in found] == ["not run", "not run", "does not fit", "not run"]


def test_what_is_computed_alone_has_rows(rows):
    found, asked = rows("8b", "--only", "float32 lora")
    assert [(row["command"], row["state"]) for row in found] == [("coldstart", "does not fit"),
                                                                 ("rl", "does not fit")]
    assert asked == ["1000"] and all(row["computed"] > 35 for row in found)


@pytest.mark.slow
def test_nobody_elses_folder_is_taken(rows, tmp_path):
    (tmp_path / "cell").mkdir()
    (tmp_path / "cell/notes.txt").write_text("mine")
    rows("toy", "--only", "bfloat16")
    assert (tmp_path / "cell/notes.txt").read_text() == "mine"
    with (tmp_path / "real_size.lock").open("w") as file:
        lock(file, "taken")
        with pytest.raises(DataError, match="another run of this script works there"):
            rows("8b", "--only", "float32 lora")
    with pytest.raises(DataError, match="--only nonesuch: no cell of 8b"):
        rows("8b", "--only", "nonesuch")


def test_a_run_that_is_stopped_stops_what_it_runs(tmp_path):
    """And leaves no checkpoint."""
    words = [sys.executable, "bench/real_size.py", "toy", "--only", "4bit", "--out", str(tmp_path)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "toy-4bit-lora-load.log"
    end = time.time() + 100
    below = []
    try:
        while not (log.exists() and below):
            assert time.time() < end and process.poll() is None
            time.sleep(0.05)
            below = [pid for pid in real_size.family(process.pid) if pid != process.pid]
        process.terminate()
        assert process.wait(60) == 143
    finally:
        process.kill()
    assert not any(real_size.status_of(pid) for pid in below)
    assert not (tmp_path / "real_size_cell").exists()


@pytest.mark.slow
def test_the_clips_are_those_of_a_folder(rows, tmp_path):
    rows("toy", "--only", "bfloat16", "--clips", str(ROOT / "tests/golden"))
    names = [path.resolve() for path in sorted((ROOT / "tests/golden").glob("*.mp4"))[:2]]
    pairs = read_pairs(tmp_path / "two.jsonl")
    shown = [[pair.video_a, pair.video_b] for pair in pairs]
    assert shown == [[*map(str, names)], [*map(str, names[::-1])]]
    assert [pair.preference for pair in pairs] == ["A", "B"]
    with pytest.raises(DataError, match="no two clips"):
        rows("toy", "--only", "bfloat16", "--clips", str(tmp_path / "clips"))


def test_the_terms_for_a_cpu():
    """8B in 4 bits with LoRA 64, stage 1, by hand."""
    shape = SHAPES["8b"]
    linear, rest = 6_945_767_424, 2 * 151_936 * 4096 + 576_388_336
    lora = 36 * 64 * (8192 + 2 * 5120 + 8192 + 3 * 16384)
    parts = cpu_memory(shape, "4bit", "lora", "coldstart", 600, 60, 2)
    assert shape.linear == linear and shape.lora(64) == lora
    assert parts["weights"] * 1e9 == pytest.approx(0.516 * linear + 4 * rest + 4 * lora)
    trained = lora + 160_496_896
    new = parts["gradients"], parts["new moments"]
    assert [1e9 * part for part in new] == pytest.approx([4 * trained, 8 * trained])
    later = cpu_memory(shape, "4bit", "lora", "resume", 600, 60, 2)
    assert later["moments"] * 1e9 == pytest.approx(8 * trained)
    assert peak(parts) == pytest.approx(0.45 + parts["weights"] + 12 * trained / 1e9)
    assert peak(later) == pytest.approx(peak(parts) + later["activations"])
    whole = cpu_memory(SHAPES["2b-4"], "float32", "whole", "rl", 600, 24, 2)
    trained = SHAPES["2b-4"].total - 406_957_056
    assert whole["reference"] * 1e9 == pytest.approx(4 * trained)  # the tower is shared
    # Weights that change, π_ref, gradients and both moments; the tower's stay in their file.
    assert peak(whole) == pytest.approx(0.45 + 20 * trained / 1e9)
    infer = cpu_memory(SHAPES["2b-4"], "float32", "whole", "infer", 600, 24, 2)
    assert infer["weights"] == 0 and peak(infer) < 0.7  # mapped files
    half = cpu_memory(SHAPES["2b"], "bfloat16", "lora", "coldstart", 600, 60, 2)
    assert 1e9 * half["weights"] == pytest.approx(4 * (SHAPES["2b"].lora(64) + 100_714_496))  # what trains
    later = cpu_memory(SHAPES["2b"], "bfloat16", "lora", "infer", 600, 32, 2)
    converted = 4 * SHAPES["2b"].lora(64) + 2 * 100_714_496  # mergers were saved in float32
    assert 1e9 * later["weights"] == pytest.approx(converted)
    total, words = SHAPES["2b-4"].total, 151_936 * 2048
    split = cpu_memory(SHAPES["2b-4"], "float32", "shards", "coldstart", 600, 24, 2)
    saving = 4 * total + 20 * (trained + 100_714_496) + 8 * words
    assert peak(split) == pytest.approx(0.9 + saving / 1e9)
    split = cpu_memory(SHAPES["2b-4"], "float32", "shards", "rl", 600, 24, 2)
    thinking = 3 * 8 * total  # the policy and π_ref, split over both ranks, and whole on each
    assert peak(split) == pytest.approx(0.9 + thinking / 1e9 + split["cache"])


# ------------------------------
# What loading and saving hold


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = DeScore.load(ROOT / "toy/backbone", device="cpu")
    model.set_trainable(0)
    return model


def test_a_step_of_the_optimiser_makes_no_copies():
    parameter = torch.nn.Parameter(torch.zeros(2**24))
    parameter.grad = torch.ones_like(parameter)
    optimizer = adamw([{"params": [parameter], "lr": 1e-3}], 0.01)
    optimizer.step()  # its moments are made
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest is what is there now
    except OSError as error:
        pytest.skip(str(error))
    before = real_size.status_of(os.getpid())["VmHWM"]
    optimizer.step()
    after = real_size.status_of(os.getpid())["VmHWM"]
    assert after - before < parameter.nbytes / 2 / 1e9


def test_a_checkpoint_is_written_from_the_weights_themselves(model, tmp_path, monkeypatch):
    optimizer = adamw([{"params": model.trainable().values(), "lr": 1e-3}], 0.01)
    for parameter in model.trainable().values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    written = {}
    monkeypatch.setattr(checkpoint, "save_file", lambda tensors, path: (
        written.update({name: tensor.data_ptr() for name, tensor in tensors.items()}), path.touch()))
    checkpoints = Checkpoints(tmp_path, 2, ALONE)
    checkpoints.attach(model, optimizer)
    checkpoints.save(1, {"args": {}})
    for number, (name, parameter) in enumerate(model.trainable().items()):
        assert written[f"weight/{name}"] == parameter.data_ptr()
        moment = optimizer.state[parameter]["exp_avg"]
        assert written[f"optimizer/{number}/exp_avg"] == moment.data_ptr()


def test_a_rank_that_does_not_write_keeps_no_gathered_weight(model, tmp_path, monkeypatch):
    kept, most = weakref.WeakSet(), []

    def whole(tensor):
        gathered = tensor.detach().clone()
        kept.add(gathered)
        most.append(len(kept))
        return gathered

    monkeypatch.setattr(saved, "whole", whole)
    model.save(tmp_path / "model", write=False)
    assert len(most) > 50 and max(most) <= 2 and not (tmp_path / "model").exists()


PEAK_OF_LOAD = """
import json, sys, threading, time
sys.path[:0] = ["{root}", "{root}/bench"]
import bitsandbytes, real_size
def size():
    return real_size.status_of("self")["RssAnon"]
sizes, done = [size()], []
def look():
    while not done:
        sizes.append(size()); time.sleep(0.002)
looking = threading.Thread(target=look); looking.start()
model = real_size.DeScore.load("{model}", device="cpu", **{more})
done.append(1); looking.join()
weights = sum({{t.data_ptr(): t.nbytes for t in model.state_dict().values()}}.values())
print(json.dumps([max(sizes) - sizes[0], weights / 1e9]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "more"), [("float32", "{}"), ("4bit", '{"quant": "4bit"}')])
def test_loading_takes_hardly_more_than_the_weights(kind, more, tmp_path):
    """0.7 GB of weights in float32, a third of a GB in 4 bits."""
    shape = real_size.Shape(1024, 8, 8, 4, 128, 4096, 538, True, 8, 512, 8, 2048, (1, 2, 3), 0, 0)
    real_size.write_checkpoint(shape, real_size.tokenizer_of("toy", tmp_path), tmp_path / "model")
    code = PEAK_OF_LOAD.format(root=ROOT, model=tmp_path / "model", more=more)
    env = os.environ | real_size.GIVES_BACK
    said = subprocess.check_output([sys.executable, "-c", code], env=env)
    highest, weights = json.loads(said.splitlines()[-1])
    assert highest < 1.1 * weights + 0.1  # and what the loader itself needs, which does not grow


@pytest.mark.slow
def test_every_cell_of_the_toy_is_measured(tmp_path):
    out = tmp_path / "out"
    shown = subprocess.check_output([sys.executable, "bench/real_size.py", "toy", "--out", out], cwd=ROOT,
                                    text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    commands = [len(cell.commands) for cell in real_size.CELLS if cell.size == "toy"]
    assert len(rows) == sum(commands) == len(shown.splitlines()) - 2
    for row in rows:
        assert row["state"] == "measured" and row["failed"] is None, row
        assert 0.1 < row["anonymous"] < row["resident"] < 3 and 0 < row["seconds"] < 300
    assert not (out / "cell").exists()
