"""Where the work runs: small /dev/shm and disks, file systems without locks, other users, terminals and
readers of the output, models that have moved."""

import ast
import ctypes
import errno
import gc
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import traceback
from argparse import ArgumentTypeError
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, Qwen3VLForConditionalGeneration

import infer
from data import DataError, Pairs
from model import DeScore
from support.batches import done_ahead
from support.checkpoint import Checkpoints
from support.command import run_command
from support.files import amend, lock, put_in_place, write_whole
from support.ranks import ALONE
from support.run import Run, Skipped, append
from support.settings import RunArgs
from support.tables import as_json
from tools.formats import check_out
from tools.journal import Journal
from tools.report import page_path

MADE = {"seed": 0, "cot": None}
NEW_MOUNTS, PRIVATE = 0x20000, 0x44000  # of unshare(2); MS_REC | MS_PRIVATE of mount(2)


def in_a_fork(body, *arguments, mount=None, size="1m"):
    """What `body` returns or prints as the one line of its error, in a forked process, with a small file
    system of its own at `mount`. Skips where none may be mounted."""

    def child(end):
        try:
            if mount:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.unshare(NEW_MOUNTS) or libc.mount(b"none", b"/", None, PRIVATE, None) or libc.mount(
                        b"tmpfs", str(mount).encode(), b"tmpfs", 0, f"size={size}".encode()):
                    end.send(("skip", os.strerror(ctypes.get_errno())))
                    return
            end.send(("done", body(*arguments)))
        except (Exception, SystemExit) as error:  # noqa: BLE001 (all is sent)
            end.send((type(error).__name__, str(error) or traceback.format_exc()))

    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=child, args=(there,))
    process.start()
    there.close()
    try:
        assert here.poll(60), "it waits for ever"
        how, what = here.recv()
    finally:
        process.kill()
        process.join()
    if how == "skip":
        pytest.skip(f"no file system can be mounted here: {what}")
    return how, what


# ------------------------------------------------------------------------------------------------------------
# Between the processes that decode ahead and the one that waits for them


def a_video(item):
    return torch.zeros(3_000_000)


def is_killed(item):
    os.kill(os.getpid(), signal.SIGKILL)


def lacks_a_package(item):
    raise ImportError("No module named 'x'")


class Odd:
    def __reduce__(self):
        raise OSError(errno.EMFILE, "Too many open files")


def cannot_be_sent(item):
    return Odd()


def gone(item):
    os._exit(3)


def all_of(work, workers=1):
    return len(list(done_ahead(work, [0, 1, 2], workers)))


@pytest.mark.parametrize(("work", "reason"), [
    (is_killed, "DataLoader worker"), (gone, "DataLoader worker"), (cannot_be_sent, "Too many open files"),
    (lacks_a_package, "No module named 'x'")])
def test_whatever_fails_in_a_worker_is_one_line(work, reason):
    how, said = in_a_fork(all_of, work)
    assert how == "DataError" and reason in said and len(said.splitlines()) == 1, said
    assert "--workers 0 needs none" in said and "/dev/shm, which holds" in said


def test_videos_larger_than_shared_memory_are_one_line():
    how, said = in_a_fork(all_of, a_video, mount="/dev/shm")
    assert how == "DataError" and "/dev/shm, which holds 1 MB" in said and "--workers 0" in said, said
    assert in_a_fork(all_of, a_video, 0, mount="/dev/shm") == ("done", 3)
    assert in_a_fork(all_of, a_video, mount="/dev/shm", size="64m") == ("done", 3)


def test_too_few_files_are_one_line():
    def body():
        largest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (largest + 40, largest + 40))
        return all_of(many)

    how, said = in_a_fork(body)
    assert how == "DataError" and "--workers 0" in said and len(said.splitlines()) == 1, said


def many(item):
    return [torch.zeros(1) for _ in range(100)]


@pytest.mark.parametrize("started", [0, 1])
def test_workers_that_cannot_be_started_are_one_line(started):
    start, alive = BaseProcess.start, []

    def refuse(process):
        if len(alive) == started:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        alive.append(process)
        start(process)

    def body():
        complaints = []
        sys.unraisablehook = complaints.append
        BaseProcess.start = refuse
        with pytest.raises(DataError) as caught:
            all_of(a_video, 2)
        said = str(caught.value)
        del caught
        gc.collect()
        for process in alive:
            process.kill()
        return said, len(complaints)

    _, (said, complaints) = in_a_fork(body)
    assert "Resource temporarily unavailable" in said and "--workers 0" in said
    assert complaints == 0  # of torch


def test_a_worker_that_dies_while_something_else_is_done_is_one_line():
    def main():
        videos = done_ahead(dies_second, [0, 1, 2], 1)
        next(videos)
        for _ in range(10**9):
            signal.pause()

    how, said = in_a_fork(run_command, main)
    assert how == "SystemExit" and said.startswith("error: ") and "--workers 0" in said, said


@pytest.mark.parametrize("kind", ["CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines",
                                  "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"])
def test_memory_that_is_not_there_is_one_line(kind):
    def main(error):
        raise RuntimeError(error)

    with pytest.raises(SystemExit) as caught:
        run_command(partial(main, kind))
    assert str(caught.value) == "error: " + kind.replace("\n", " ")
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run_command(partial(main, "a fault of ours"))


def dies_second(item):
    if item:
        time.sleep(0.5)  # the first has been taken, and something else is done
        is_killed(item)
    return item


def test_workers_are_gone_when_one_has_failed():
    def body():
        with pytest.raises(DataError):
            all_of(lacks_a_package, 2)
        gc.collect()
        return len(multiprocessing.active_children())

    assert in_a_fork(body) == ("done", 0)


@pytest.mark.slow
def test_torch_says_nothing_more_of_workers_that_fail():
    """Not as the command ends either, in a process of its own. Whether it would have is a matter of
    moments, so several are looked at."""
    code = ("from test_places import *\n"
            "run_command(lambda: all_of(lacks_a_package, 2))")
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", env=os.environ | {
            "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and done.stderr.startswith("error: "), done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_what_is_decoded_ahead_is_what_is_decoded_here():
    made = [list(done_ahead(squares, [1, 2, 3], workers)) for workers in (0, 1, 2)]
    assert made == [[1, 4, 9]] * 3


def test_what_is_decoded_ahead_comes_in_the_order_asked_for():
    made = [list(done_ahead(squares, [1, 2, 3], workers, iter([2, 0]))) for workers in (0, 1)]
    assert made == [[9, 1]] * 2


def squares(item):
    return item**2


# ------------------------------------------------------------------------------------------------------------
# Other users


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_leaves(mask, mode, umask, tmp_path):
    umask(mask)
    (tmp_path / "m.partial/in").mkdir(parents=True)
    for name in ("a.safetensors", "in/b.safetensors"):
        save_file({"x": torch.zeros(1)}, tmp_path / "m.partial" / name)
    put_in_place(tmp_path / "m.partial", tmp_path / "m")
    write_whole(tmp_path / "page.html", "x")
    append(tmp_path / "log.jsonl", [{}])
    Journal(tmp_path / "journal.jsonl", MADE, [])
    parameter = torch.nn.Parameter(torch.zeros(1))
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1, ALONE)
    checkpoints.folder.mkdir()
    checkpoints.attach(Holder(parameter), torch.optim.SGD([parameter]))
    checkpoints.save(1, {"args": {}})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 8
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}
    assert os.umask(mask) == mask  # it is as it was


class Holder:
    def __init__(self, parameter):
        self.parameter = parameter

    def trainable(self):
        return {"x": self.parameter}


def test_others_may_read_a_saved_model(model, umask, tmp_path):
    umask(0o022)
    model.save(tmp_path / "full")
    model.float().set_trainable(4)
    model.save(tmp_path / "adapter")
    for path in [*tmp_path.glob("full/*"), *tmp_path.glob("adapter/*")]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o644, path


# ------------------------------------------------------------------------------------------------------------
# Systems without locks, and other systems


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, 524, errno.EINVAL])
def test_a_file_system_without_locks_is_said_and_used(number, tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(number, "not here")

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr("fcntl.lockf", refuse)
    monkeypatch.setattr("signal.signal", lambda *handler: None)
    Journal(tmp_path / "j.jsonl", MADE, [("v", "p")]).add({"video": "v", "prompt": "p", "cot": "c"})
    assert "j.jsonl: cannot be locked" in capsys.readouterr().err
    Run(RunArgs(out=str(tmp_path / "run"), train="x"), "rl", ALONE)
    said = capsys.readouterr().err
    assert "run/lock: cannot be locked" in said and len(said.splitlines()) == 1
    assert len((tmp_path / "j.jsonl").read_text().splitlines()) == 2


def test_a_lock_of_another_is_an_error_and_no_locks_at_all_are_not(tmp_path, monkeypatch, capsys):
    with (tmp_path / "f").open("a") as one, (tmp_path / "f").open("a") as other:
        lock(one, "taken")
        with pytest.raises(DataError, match="taken"):
            lock(other, "taken")
        held = in_a_fork(lock, (tmp_path / "f").open("a"), "taken", "lockf")
        assert held[0] == "done"  # the two kinds know nothing of each other
        lock(one, "taken", "lockf")
        assert in_a_fork(lock, other, "taken", "lockf") == ("DataError", "taken")
        monkeypatch.setitem(sys.modules, "fcntl", None)
        lock(other, "taken")
        assert "f: cannot be locked" in capsys.readouterr().err


def test_the_lock_of_a_run_is_not_handed_on(tmp_path, monkeypatch):
    """A worker that outlives a run which was killed keeps nobody out."""
    monkeypatch.setattr("signal.signal", lambda *handler: None)

    def run_here():
        Run(RunArgs(out=str(tmp_path), train="x"), "rl", ALONE)

    def run_with_a_child():
        run = Run(RunArgs(out=str(tmp_path), train="x"), "rl", ALONE)
        child = os.fork()
        if not child:
            signal.pause()
        return child, run.out.name

    how, (child, _) = in_a_fork(run_with_a_child)
    try:
        assert how == "done" and in_a_fork(run_here) == ("done", None)
    finally:
        os.kill(child, signal.SIGKILL)


POSIX_ONLY = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog"}
NOT_ON_WINDOWS = {"SIGKILL", "SIGCHLD", "SIGHUP", "SIGPIPE", "sched_getaffinity", "fork", "getuid", "geteuid",
                  "fchmod", "O_TMPFILE", "mkfifo"}


def test_nothing_that_is_imported_is_of_one_system_alone():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("tools/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = set()
        for node in tree.body:
            names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
        attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not names & POSIX_ONLY and not attributes & NOT_ON_WINDOWS, path


@pytest.mark.slow
def test_all_is_imported_where_there_is_no_fcntl():
    code = ("import sys\n"
            "sys.modules['fcntl'] = None\n"
            "import torch.utils.data\n"
            "import infer, coldstart, rl, tools.client, tools.annotate, tools.filter, tools.serve")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ------------------------------------------------------------------------------------------------------------
# Terminals, and readers who leave


def printed(main, encoding="utf-8", errors="strict", reads=True, closed=False, to=None):
    """The exit status of a command, and what it has printed to standard output and error."""

    def body():
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(to, os.O_WRONLY) if to and number == 1 else pipe[1], number)
            raw = io.FileIO(number, "w", closefd=False)
            stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors)
            if closed:
                os.close(number)
                stream = None
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        os.close(pipe[0])
        os.close(pipe[1])
        code = None
        try:
            run_command(main)
        except SystemExit as error:
            code = error.code
        sys.stdout.flush()
        sys.stderr.flush()
        return code

    pipe = os.pipe()
    kept = os.dup(pipe[0])
    if not reads:
        os.close(pipe[0])
        os.close(kept)
        pipe = (os.open(os.devnull, os.O_RDONLY), pipe[1])
    how, code = in_a_fork(body)
    os.close(pipe[0])
    os.close(pipe[1])
    assert how == "done", (how, code)
    if not reads:
        return code, b""
    with open(kept, "rb") as file:
        return code, file.read()


NAMES = "caf\u00e9 \u4e2d \udcff.mp4"


def say_names():
    print(NAMES)
    print(NAMES, file=sys.stderr)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_what_a_terminal_cannot_show_is_shown_by_escapes(encoding):
    code, said = printed(say_names, encoding)
    line = NAMES.encode(encoding, "backslashreplace") + b"\n"
    assert (code, said) == (None, line * 2)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_json_is_json_in_any_encoding(encoding):
    code, said = printed(lambda: print(as_json({"video": NAMES})), encoding)
    assert code is None and json.loads(said.decode(encoding)) == {"video": NAMES}
    assert ("caf\u00e9".encode() in said) == (encoding == "utf-8")


@pytest.mark.parametrize("closed", [False, True])
def test_a_reader_who_leaves_ends_no_work(closed, tmp_path):
    def main():
        for _ in range(100_000):
            print("x" * 10)
        print("y", file=sys.stderr)
        (tmp_path / "result").write_text("z")
        raise SystemExit(3)

    code, _ = printed(main, reads=False, closed=closed)
    assert code == 3 and (tmp_path / "result").read_text() == "z"


def test_output_that_has_no_room_is_one_line():
    code, said = printed(say_names, to="/dev/full")  # after which it can be flushed
    assert code.startswith("error: ") and "No space left on device: 'the output'" in code and said == b""


def test_a_page_is_written_before_anything_is_printed(model, keys, tmp_path, monkeypatch):
    def full(*text, **how):
        if how.get("file") is not sys.stderr:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(infer.DeScore, "load", lambda *source, **how: model)
    monkeypatch.setattr(sys, "argv", ["infer.py", *keys[0], "--model", "x", "--cot", "off",
                                      "--report", str(tmp_path / "page.html")])
    monkeypatch.setattr("builtins.print", full)
    with pytest.raises(OSError, match="No space"):
        infer.main()
    assert (tmp_path / "page.html").stat().st_size > 1000


def test_names_that_are_no_unicode_are_kept_in_json(tmp_path):
    path = tmp_path / "descore.json"
    path.write_text("{}")
    amend(path, backbone=NAMES)
    assert json.loads(path.read_text(encoding="utf-8")) == {"backbone": NAMES}
    assert "caf\u00e9 \u4e2d" in path.read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------
# Models that have moved, and backbones that are quantised


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A model on a backbone that lies beside it, and that backbone."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(ROOT / "toy/backbone", folder / "backbone")
    model = DeScore.load(folder / "backbone", device="cpu")
    model.set_trainable(2)
    model.save(folder / "runs/model")
    return folder


def test_a_model_moves_with_its_backbone_and_is_found_by_links(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "all")
    (tmp_path / "link").symlink_to(tmp_path / "all/runs/model")
    (tmp_path / "all/deeper").mkdir()
    (tmp_path / "all/deeper/runs").symlink_to(tmp_path / "all/runs")
    for place in ("all/runs/model", "link", "all/deeper/runs/model"):
        assert Path(DeScore.load(tmp_path / place).source).samefile(tmp_path / "all/backbone")


def test_a_model_that_moved_alone_says_what_to_put_where(adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place = tmp_path / "model"
    shutil.copytree(adapter / "runs/model", place)
    for backbone in (None, "/nowhere/backbone", "no/hub-id"):
        about = json.loads((place / "descore.json").read_text())
        (place / "descore.json").write_text(json.dumps(about | ({"backbone": backbone} if backbone else {})))
        with pytest.raises(DataError) as caught:
            DeScore.load(place)
        said = str(caught.value)
        assert said.startswith(f"{place / 'descore.json'}: ") and '"backbone"' in said
        assert (backbone or "../../backbone") in said and len(said.splitlines()) == 1
    (place / "descore.json").write_text(json.dumps(about | {"backbone": str(adapter / "backbone")}))
    assert DeScore.load(place).source == str(adapter / "backbone")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """The embedded backbone as transformers saves it in so many bits."""
    folder = tmp_path_factory.mktemp("quantised")
    for bits in (4, 8):
        qwen = Qwen3VLForConditionalGeneration.from_pretrained(
            ROOT / "toy/backbone", quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}),
            device_map={"": "cpu"})
        qwen.save_pretrained(folder / str(bits))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "toy/backbone" / name, folder / str(bits))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_backbone_trains_by_an_adapter_alone(bits, dtype, quantised, keys, tmp_path):
    model = DeScore.load(quantised / str(bits), dtype=dtype, device="cpu")
    for rank, merger in ((0, False), (2, True)):
        with pytest.raises(DataError, match="is quantised .*--lora-rank.*--train-merger"):
            model.set_trainable(rank, merger)
    model.set_trainable(2)
    batch = model.encode(model.processor.collate([model.processor(*key) for key in keys[:2]]))
    thoughts = model.think(batch, 2, 4)
    logps, scores = model.group(batch, thoughts.tokens, thoughts.mask)
    assert logps.isfinite().all() and scores.isfinite().all()
    scores.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trainable().values())
    model.save(tmp_path / "m")
    again = DeScore.load(tmp_path / "m", dtype=dtype, device="cpu")
    # bitsandbytes computes in the type that a layer has met first, and so rounds otherwise in bfloat16.
    slack = 0.0 if dtype == torch.float32 else 0.05
    expected = model.eval().score(batch, [None, None])
    assert torch.allclose(again.score(batch, [None, None]), expected, rtol=0, atol=slack)
    with pytest.raises(DataError, match="quantised already, which leaves --quant nothing to do"):
        DeScore.load(quantised / str(bits), dtype=dtype, device="cpu", quant="4bit")


# ------------------------------------------------------------------------------------------------------------
# Files that are read and written, and full disks


@pytest.mark.parametrize("how", ["itself", "partial", "linked", "partial linked", "directory"])
def test_no_command_writes_over_what_it_reads(how, tmp_path):
    out, pairs = tmp_path / "x.jsonl", tmp_path / "pairs.jsonl"
    pairs.write_text("kept")
    if how == "directory":
        out.mkdir()
    elif how == "itself":
        out = pairs
    elif how == "partial":
        pairs = pairs.rename(tmp_path / "x.jsonl.partial")
    else:
        (tmp_path / "x.jsonl.partial" if "partial" in how else out).symlink_to(pairs)
    with pytest.raises(DataError, match="is a directory|the pair file itself"):
        check_out(out, pairs)
    assert pairs.read_text() == "kept"


def test_a_page_is_not_written_over_what_is_read(tmp_path):
    page = str(tmp_path / "page.html")
    (tmp_path / "link").symlink_to(page)
    assert page_path(page, tmp_path / "other", None) == Path(page)
    for other in (page, tmp_path / "page.html.partial", tmp_path / "link"):
        with pytest.raises(ArgumentTypeError, match="would be written over"):
            page_path(page, None, other)


def test_a_page_is_told_what_is_read(tmp_path, monkeypatch, capsys):
    pairs = tmp_path / "pairs.html"
    monkeypatch.setattr(sys, "argv", ["infer.py", "--pairs", str(pairs), "--report", str(pairs)])
    with pytest.raises(SystemExit):
        infer.parse_args()
    assert "would be written over" in capsys.readouterr().err


def test_more_new_tokens_than_positions_are_refused(model, keys, monkeypatch):
    batch = model.processor.collate([model.processor(*keys[0])])
    most = model.qwen.config.text_config.max_position_embeddings
    with pytest.raises(DataError, match=f"{most + 1:,} new tokens: .* knows {most:,} positions"):
        model.think(batch, 1, most + 1)
    monkeypatch.setattr(model.qwen.config.text_config, "max_position_embeddings", 3)
    assert model.think(batch, 1, 3).tokens.shape[-1] <= 3


@pytest.mark.parametrize("change", [{"skipped": None}, {"skipped": 3}, {"digests": []}, {"skipped": "gone"}])
def test_a_state_that_a_run_cannot_read_is_one_line_and_loses_nothing(change, tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *handler: None)
    run = Run(RunArgs(out=str(tmp_path), train="x"), "rl", ALONE)
    run.skipped = Skipped(tmp_path / "skipped.jsonl", Pairs(tmp_path), 1.0)
    run.make_digests = lambda model: {}
    run.logs[0].write_text("{}\n")
    state = {"args": run.deciding, "digests": {}, "skipped": [], "metrics_bytes": 3} | change
    if change == {"skipped": "gone"}:
        del state["skipped"]
    parameter = torch.nn.Parameter(torch.zeros(1))
    holder, optimizer = Holder(parameter), torch.optim.SGD([parameter])
    run.checkpoints.attach(holder, optimizer)
    run.checkpoints.save(1, state)
    with pytest.raises(DataError, match="checkpoints: a state.json is not as it was written"):
        run.resume(holder, optimizer)
    assert run.logs[0].read_text() == "{}\n"


def fill(folder):
    """Leave no room in a small file system."""
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            pass


def said_by(what):
    with pytest.raises((DataError, OSError)) as caught:
        what()
    return str(caught.value)


def on_a_full_disk(folder):
    """What is said by all that writes there when it is full, and what is left."""
    journal = Journal(folder / "j.jsonl", MADE, [("v", "p")])
    write_whole(folder / "page.html", "old")
    parameter = torch.nn.Parameter(torch.zeros(40_000))
    checkpoints = Checkpoints(folder / "checkpoints", 1, ALONE)
    checkpoints.folder.mkdir()
    checkpoints.attach(Holder(parameter), torch.optim.SGD([parameter]))
    checkpoints.save(1, {"args": {}})
    append(folder / "log.jsonl", [{"step": 1}])
    fill(folder)
    record = {"video": "v", "prompt": "p", "cot": "c" * 10_000}
    said = {"j.jsonl": said_by(lambda: journal.add(record)),
            "log.jsonl": said_by(lambda: append(folder / "log.jsonl", [{"step": "2" * 10_000}])),
            "step-2": said_by(lambda: checkpoints.save(2, {"args": {}}))}
    said_by(lambda: write_whole(folder / "page.html", "new" * 10_000))
    old = (folder / "page.html").read_text()
    return said, old, checkpoints.newest({})["step"], sorted(path.name for path in folder.iterdir())


def test_a_full_disk_loses_nothing_and_names_the_file(tmp_path):
    how, what = in_a_fork(on_a_full_disk, tmp_path, mount=tmp_path)
    assert how == "done", what
    said, old, newest, left = what
    assert all(name in line and "No space left" in line for name, line in said.items()), said
    assert (old, newest) == ("old", 1)
    assert left == ["checkpoints", "filler", "j.jsonl", "log.jsonl", "page.html"]
