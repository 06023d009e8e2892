"""The server among many callers, of whom some are slow, gone, greedy or hostile; and one answer for a video
through whatever door it comes."""

import base64
import http.client
import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import world
from conftest import ROOT
from launch import Started

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("PIL.Image")

from test_memory import decoded
from test_serve import (
    HEAD,
    Slow,
    ask,
    connected,
    file_in,
    frames_in,
    health,
    in_process,
    of_size,
    under_way,
    wait_until,
)

from data import VideoSettings
from infer import Scorer
from model import DeScore
from tools import gate
from tools.client import Client, png, unusable

# Few frames, at an odd rate; and so few pixels that they are fewer a frame where there are more frames.
SETTINGS = VideoSettings(fps=1.7, min_frames=4, max_frames=10, min_pixels=1024, max_pixels=8192,
                         total_pixels=16_384)
LIMITS = ["--accept-any", "--max-new-tokens", 4, "--max-videos", 3, "--max-work", 1_000_000]
HOW = {"max_new_tokens": 4, "accept_any": True}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    torch.manual_seed(0)
    model = DeScore.load(ROOT / "toy/backbone", device="cpu")
    model.processor.settings = SETTINGS
    model.set_trainable(4)
    folder = tmp_path_factory.mktemp("model") / "model"
    model.save(folder, score_mean=0.5, score_std=0.25)
    return folder


@pytest.fixture(scope="module")
def scorer(model_dir):
    return Scorer(model_dir, "cpu")


def start(model_dir, *more):
    """A server on a free port, and its port."""
    process = Started("-m", "tools.serve", "--model", model_dir, "--port", 0, *more)
    while not (said := re.search(r":(\d+)\n", Path(process.files[0]).read_text())):
        assert process.running(), process.wait()
        time.sleep(0.02)
    return process, said[1]


@pytest.fixture(scope="module")
def url(model_dir):
    """A server that any host's name may reach."""
    process, port = start(model_dir, "--host", "0.0.0.0", *LIMITS)
    yield f"http://127.0.0.1:{port}"
    os.kill(process.pid, signal.SIGINT)
    done = process.wait(30)
    assert done.returncode == 0 and all(re.match("refused: 4", line) for line in done.stderr.splitlines())


def film(folder, total, fps, size=64):
    """A file of so many frames, and these."""
    rng = np.random.default_rng(total)
    frames = world.render(world.Clip(world.draw_scene(rng), signature="grain"), rng)
    places = np.arange(size) * 64 // size
    path = folder / f"{total}-{fps}.mp4"
    world.write_video(path, np.ascontiguousarray(frames[np.arange(total) % 16][:, places][:, :, places]), fps)
    return path, *decoded(path)


# ------------------------------------------------------------------------------------------------------------
# One answer through every door


def same(found, expected):
    """As records are the same where NaN stands for no score."""
    return {**found, "score": repr(found["score"])} == {**expected, "score": repr(expected["score"])}


# Shorter than min_frames, of fractional frames, as long as max_frames, longer; and resized by the budget.
CLIPS = [(1, 8, 64), (3, 4, 64), (16, 4, 96), (41, 7, 96), (33, 4, 80)]


@pytest.mark.parametrize(("total", "fps", "size"), CLIPS)
def test_a_clip_has_one_score_through_every_door(url, scorer, tmp_path, total, fps, size):
    path, frames, rate = film(tmp_path, total, fps, size)
    prompt = "" if total == 16 else f"a red circle, {total}"
    (expected,) = scorer(path, prompt, **HOW)
    assert expected["error"] is None and math.isfinite(expected["score"])
    doors = {"memory": scorer(frames, prompt, fps=rate, layout="THWC", **HOW),
             "served file": Client(url)(path, prompt),
             "served frames": Client(url)(frames / 255, prompt, fps=rate, layout="THWC")}
    body = {"prompt": [prompt], "video": [frames_in(frames)], "fps": rate}
    doors["all frames"] = ask(url, "/compute", body)[1]["records"]
    for name, (found,) in doors.items():
        assert same(found, expected), name  # bit for bit


@pytest.mark.slow
def test_servers_are_known_to_be_equal(url, model_dir):
    """By what stands in the heads of their answers: weights, and what else decides a record."""
    clip = np.zeros((4, 3, 64, 64), np.uint8)
    for flags, is_equal in ((LIMITS, True), ([*LIMITS, "--max-new-tokens", 5], False), (LIMITS[1:], False)):
        process, port = start(model_dir, *flags)
        both = Client([url, f"http://127.0.0.1:{port}"])
        if is_equal:
            assert len(both([clip] * 2, "p", fps=4)) == 2
        else:
            with pytest.raises(RuntimeError, match="has another model than .*, or judges otherwise"):
                both([clip] * 2, "p", fps=4)
        os.kill(process.pid, signal.SIGINT)
        process.wait(30)


def test_a_frame_of_no_numbers_is_the_same_error_through_every_door(url, scorer):
    frames = np.full((6, 3, 64, 64), 0.5)
    frames[3, 1, 7, 9] = math.nan
    (expected,) = scorer(frames, "p", fps=4, **HOW)
    (served,) = Client(url)(frames, "p", fps=4)
    assert same(served, expected) and "from nan to nan" in served["error"]


def test_frames_that_were_chosen_otherwise_are_refused(url):
    sampling = health(url)["sampling"]
    assert sampling == {"fps": 1.7, "min_frames": 4, "max_frames": 10}
    four = frames_in(np.zeros((4, 64, 64, 3), np.uint8))
    body = {"prompt": ["p"], "video": [four], "fps": 4, "seconds": [[0.0, 0.5, 1.0, 2.0]],
            "sampling": sampling}
    assert ask(url, "/compute", body)[1]["errors"] == [None]
    changes = (({"sampling": sampling | {"fps": 2.0}}, "chosen by"), ({"sampling": None}, "sampling"),
               ({"seconds": [[0.0]] * 2}, "seconds of each"))
    for change, why in changes:
        status, found = ask(url, "/compute", body | change)
        assert status == 422 and why in found["detail"]
    clips = (([0.0, 2.0, 1.0, 3.0], four, "in order"), ([-1.0, 0.0, 1.0, 2.0], four, "in order"),
             ([0.0, 0.5, 1.0], four, "one for each"), ([0.0, 1.0, 2.0], four[:3], "an even number"),
             ([*range(12)], four * 3, "up to 10"), ([], [], "no frames"))
    for seconds, texts, why in clips:
        found = ask(url, "/compute", body | {"video": [texts], "seconds": [seconds]})[1]
        assert why in found["errors"][0]


def test_a_model_that_looks_twice_gets_all_frames():
    score = Slow()
    score.go.set()
    with in_process(score, max_body=10**6) as url:
        assert health(url)["sampling"] is None
        assert Client(url)(np.zeros((30, 3, 8, 8)), "p", fps=4)[0]["error"] is None
        assert score.clips[0].total == 30 and score.clips[0].seconds[-1] == 29 / 4
    with in_process(score, VideoSettings(), max_body=10**6) as url:
        assert Client(url)(np.zeros((30, 3, 8, 8)), "p", fps=4)[0]["error"] is None
        assert score.clips[1].total == 14 and score.clips[1].seconds[-1] == 29 / 4


# ------------------------------------------------------------------------------------------------------------
# Callers


def test_who_has_gone_is_not_thought_about_and_a_second_try_is_answered_at_once(caplog):
    score = Slow()
    with in_process(score, kept=9) as url, ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask, url, "/compute", of_size(300, "first"))
        wait_until(lambda: score.asked)
        for name in ("gone", "first"):  # who asks what is under way may go as well
            with connected(url) as client:
                client.sendall(HEAD % 300 + of_size(300, name))
                wait_until(lambda: under_way(url) == 2)
            wait_until(lambda: under_way(url) == 1)
        score.go.set()
        assert first.result(30) == ask(url, "/compute", of_size(300, "first"))
        assert ask(url, "/compute", of_size(300, "last"))[0] == 200
    assert score.asked == [["first"], ["last"]]
    assert not caplog.records  # asyncio has nothing to complain about


def test_the_second_of_a_frame_is_part_of_what_is_asked():
    score = Slow()
    score.go.set()
    with in_process(score, VideoSettings(), kept=9) as url:
        for fps in (4, 8, 4):
            ask(url, "/compute", {"prompt": ["p"], "video": [["A"] * 4], "fps": fps})
    assert len(score.asked) == 2


def test_a_request_has_bounds_that_are_said(url):
    one = {"prompt": "p", "video": frames_in(np.zeros((2, 8, 8, 3), np.uint8))}
    large = [base64.b64encode(png(np.zeros((600, 1000, 3), np.uint8))).decode()] * 2
    bounds = health(url)["bounds"]
    assert bounds == {"bytes": 1 << 30, "videos": 3, "frames": 2048, "pixels": 3840 * 2160,
                      "pixels_together": 1_000_000}
    said = "at most {bytes:,} bytes, {videos:,} videos of {frames:,} frames of {pixels:,} pixels, " \
           "{pixels_together:,} pixels together".format(**bounds)
    for videos, what in (([one["video"]] * 4, "4 videos; a request has "), ([large], "1,200,000 pixels; ")):
        status, found = ask(url, "/compute", {"prompt": ["p"] * len(videos), "video": videos, "fps": 4})
        assert status == 413 and found["detail"].startswith(what) and found["detail"].endswith(said)


def test_files_are_bounded_together(url, tmp_path):
    path, _, _ = film(tmp_path, 130, 8)  # 532,480 pixels
    turn = {"history": [{"text": "p", "video_b64": file_in(path)}], "required_rewards": ["descore"]}
    assert ask(url, "/score", {"requests": [turn]})[0] == 200
    status, found = ask(url, "/score", {"requests": [turn] * 2})
    assert status == 413 and found["detail"].startswith("1,064,960 pixels; ")
    assert ask(url, "/score", {"requests": [turn] * 4})[1]["detail"].startswith("4 videos; ")


def test_what_was_asked_and_what_was_refused_is_counted(capsys):
    found = [{**unusable(None), "score": 1.0, "cot": "", "truncated": False, "format_ok": True},
             {**unusable("it did not end"), "truncated": True, "format_ok": False},
             {**unusable("no answer"), "truncated": False, "format_ok": False}]
    with in_process(lambda videos, prompts: [found["abc".index(prompt)] for prompt in prompts]) as url:
        body = {"prompt": [*"abca"], "video": [["A"]] * 3 + [["A"] * 41]}
        assert ask(url, "/compute", body)[0] == 200 and ask(url, "/compute", body)[0] == 200
        assert health(url)["videos"] == {"asked": 8, "scored": 2, "cut_off": 2, "no_format": 4, "errors": 6}
        for body, times in ((b"\x1b[2J{", 3), (b" " * 1001, 2)):
            for _ in range(times):
                ask(url, "/compute", body)
        assert ask(url, "/nowhere\n".strip(), b"")[0] == 404
        assert health(url)["refused"] == {"422": 3, "413": 2, "404": 1}
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" so far: ")[0] for line in lines] == ["refused: 422, 1", "refused: 413, 1",
                                                              "refused: 404, 1"]
    assert all(line.isprintable() for line in lines)


def test_a_page_of_another_site_gets_nothing():
    score = Slow()
    score.go.set()
    hosts = gate.own_hosts("127.0.0.1", ["Proxy.example"])
    with in_process(score) as free:
        for host in ("node-7.cluster:8000", "127.0.0.1", "any"):
            assert ask(free, "/health", b"", {"Host": host}, "GET")[0] == 200
        cases = (({}, 200), ({"Content-Type": "application/json; charset=utf-8"}, 200),
                 ({"Content-Type": "text/plain"}, 415), ({"Content-Type": ""}, 415),
                 ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
                 ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
                 ({"Origin": free}, 200), ({"Origin": free + "0"}, 403))
        for headers, status in cases:
            assert ask(free, "/compute", of_size(200), headers)[0] == status, headers
    assert gate.own_hosts("0.0.0.0", []) == gate.own_hosts("::", []) == set()
    assert gate.own_hosts("10.0.0.7", ["Node"]) == {"node"}
    with in_process(score, hosts=hosts) as own:
        port = own.rpartition(":")[2]
        for host in (f"localhost:{port}", "LOCALHOST", f"127.0.0.1:{port}", "[::1]:1", "proxy.example"):
            assert ask(own, "/health", b"", {"Host": host}, "GET")[0] == 200
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.2", "[::2]",
                     "", "[", "evil.example@localhost.x"):
            for path, method in (("/health", "GET"), ("/compute", "POST"), ("/score", "POST")):
                assert ask(own, path, b"", {"Host": host}, method)[0] == 403, host


def test_a_server_for_all_hosts_is_asked_by_its_name(url):
    assert ask(url, "/health", b"", {"Host": "node-7.cluster:8000"}, "GET")[0] == 200
    assert ask(url, "/compute", b"{}", {"Host": "node-7.cluster", "Origin": "http://other"})[0] == 403


def is_closed(client):
    client.settimeout(30)
    try:
        return client.recv(1000) == b""
    except ConnectionError:
        return True


def test_slow_senders_shut_nobody_out(monkeypatch):
    monkeypatch.setattr(gate, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(gate, "CONNECTIONS", 4)
    score = Slow()
    score.go.set()
    with in_process(score, queue=1) as url:
        slow = [connected(url)]
        slow[0].sendall(HEAD % 900 + of_size(900)[:500])  # takes no place in the queue
        wait_until(lambda: health(url)["coming"] == 1)
        assert ask(url, "/compute", of_size(300))[0] == 200
        silent, half = connected(url), connected(url)
        half.sendall(HEAD[:20])
        assert is_closed(silent) and is_closed(half)
        # Beyond four, the oldest that is sending makes room; who waits for an answer keeps its place.
        score.go.clear()
        waiting = connected(url)
        waiting.sendall(HEAD % 300 + of_size(300, "w"))
        wait_until(lambda: under_way(url) == 1)
        for _ in range(20):
            slow.append(connected(url))
            slow[-1].sendall(HEAD % 900 + b"{")
        assert is_closed(slow[0])
        assert health(url)["under_way"] == 1
        score.go.set()
        waiting.settimeout(30)
        assert waiting.recv(1000).startswith(b"HTTP/1.1 200")
        for client in (*slow, silent, half, waiting):
            client.close()


# Opens as many connections as told, says nothing, and asks by another.
CROWD = """import resource, socket, sys, time, urllib.request as web
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
url, count = sys.argv[1], int(sys.argv[2])
port = int(url.rpartition(":")[2])
crowd = []
for _ in range(count):  # no faster than they are let in
    crowd.append(socket.create_connection(("127.0.0.1", port)))
    time.sleep(0.002)
assert web.urlopen(url + "/health", timeout=9).status == 200"""


def test_where_few_files_may_be_open_nobody_is_shut_out(monkeypatch, caplog):
    monkeypatch.setattr(gate, "HEAD_SECONDS", 60)  # nobody goes by himself
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    here = len(os.listdir("/proc/self/fd"))  # which other tests may have opened
    most = 2 * here + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        with in_process(Slow()) as url:
            subprocess.run([sys.executable, "-c", CROWD, url, str(most)], check=True, timeout=60)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not caplog.records  # of too many open files


def test_who_does_not_read_shuts_nobody_out(monkeypatch):
    monkeypatch.setattr(gate, "CONNECTIONS", 3)
    with in_process(Slow()) as url:
        deaf = [connected(url) for _ in range(3)]
        for client in deaf:
            client.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:  # more answers than anything between holds
                    client.send(b"GET /rewards HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
                    time.sleep(0.001)
        for _ in range(5):
            assert ask(url, "/health", b"", method="GET")[0] == 200
        for client in deaf:
            client.close()


def test_what_is_no_http_is_a_refusal_as_others_are(capsys, caplog):
    with in_process(Slow()) as url:
        for said in (b"\x16\x03\x01\x02\x00\x01", b"GET /health\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n"):
            with connected(url) as client:
                client.sendall(said)
                client.settimeout(30)
                assert client.recv(1000).startswith(b"HTTP/1.1 400")
        with connected(url) as client:  # after it has been answered
            client.sendall(b"POST /compute HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            client.settimeout(30)
            assert client.recv(1000).startswith(b"HTTP/1.1 415")
            client.sendall(b"no chunk\r\n")
            wait_until(lambda: is_closed(client))
        with connected(url) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
            client.settimeout(30)
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        assert health(url)["refused"] == {"400": 4, "415": 1}
    said = capsys.readouterr().err
    assert re.fullmatch("(refused: 4.., [1-4] so far: .*\n)+", said), said
    assert not caplog.records


def test_a_second_ctrl_c_ends_it_at_once(model_dir, tmp_path):
    process, port = start(model_dir, "--window", 600, *LIMITS)
    url, (path, _, _) = f"http://127.0.0.1:{port}", film(tmp_path, 9, 4)
    body = json.dumps({"requests": [{"history": [{"text": "p", "video_b64": file_in(path)}],
                                     "required_rewards": ["descore"]}]})
    link = http.client.HTTPConnection("127.0.0.1", int(port))
    link.request("POST", "/score", body, {"Content-Type": "application/json"})
    wait_until(lambda: under_way(url) == 1)
    os.kill(process.pid, signal.SIGINT)
    wait_until(lambda: refuses(port))
    assert process.running()  # it finishes what is under way
    os.kill(process.pid, signal.SIGINT)
    done = process.wait(30)
    assert done.returncode == 130 and done.stderr == ""


def refuses(port):
    try:
        socket.create_connection(("127.0.0.1", int(port))).close()
    except ConnectionError:
        return True
    return False
