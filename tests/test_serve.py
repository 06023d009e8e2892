"""The server, started as a user starts it and asked as trainers ask; and what it says to hostile requests."""

import argparse
import ast
import base64
import http.client
import io
import json
import math
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import world
from conftest import ROOT
from launch import Started, run

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
Image = pytest.importorskip("PIL.Image")

from test_memory import decoded, save_scorer

from data import DataError
from infer import Scorer
from support.frames import Video
from tools import gate, sent
from tools import serve as serving
from tools.client import Client, png, unusable

PAGE = (ROOT / "docs/in-a-trainer.md").read_text()
LIMITS = ["--accept-any", "--max-new-tokens", 6, "--max-frames", 40, "--max-pixels", 100_000,
          "--max-body", 2_000_000]
PORT = re.compile(r": (http://127\.0\.0\.1:(\d+))\n")


def serve(model, *more):
    """Start the server by the page's command on a free port; returns the process and its address."""
    line, *_ = re.findall(r"^    python (-m tools\.serve --model .*)$", PAGE, re.MULTILINE)
    assert "--model runs/rl --port 8000" in line
    process = Started(*line.replace("runs/rl", str(model)).replace("8000", "0").split(), *more)
    while not (said := PORT.search(Path(process.files[0]).read_text())):
        assert process.running(), process.wait()
        time.sleep(0.02)
    return process, said[1]


@pytest.fixture(scope="module")
def scorer_dir(tmp_path_factory):
    return save_scorer(tmp_path_factory.mktemp("scorer") / "model")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A file below the folder that is served, its frames and rate."""
    rng = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("videos") / "inside/v.mp4"
    path.parent.mkdir()
    world.write_video(path, world.render(world.Clip(world.draw_scene(rng), signature="grain"), rng))
    return path, *decoded(path)


@pytest.fixture(scope="module")
def url(scorer_dir, clip):
    process, url = serve(scorer_dir, "--videos", clip[0].parent.parent, *LIMITS)
    yield url
    os.kill(process.pid, signal.SIGTERM)
    done = process.wait(30)
    assert all(re.match("refused: 4", line) for line in done.stderr.splitlines()) and done.returncode == 0


@pytest.fixture(scope="module")
def expected(scorer_dir, clip):
    """The record of the clip and the prompt "p"."""
    return Scorer(scorer_dir, "cpu")(str(clip[0]), "p", max_new_tokens=6, accept_any=True)[0]


def ask(url, path, body, headers=None, method="POST"):
    """Status and JSON of a request, which is bytes or becomes JSON."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body).encode(),
                       {"Content-Type": "application/json", **(headers or {})})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def frames_in(frames):
    """As Flow-Factory's client writes them: PNG files of PIL, in base64."""
    found = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "PNG")
        found.append(base64.b64encode(file.getvalue()).decode())
    return found


def file_in(path):
    return base64.b64encode(path.read_bytes()).decode()


def like(record, expected):
    assert record["error"] is None and record["cot"] == expected["cot"]
    for name in ("score", "standardised"):
        assert record[name] == pytest.approx(expected[name], abs=1e-4)
    return True


# ------------------------------------------------------------------------------------------------------------
# As trainers ask


def test_the_client_gets_what_a_scorer_gives(url, clip, expected):
    path, frames, fps = clip
    score, tensor = Client(url), torch.from_numpy(frames).permute(0, 3, 1, 2)
    images = [Image.fromarray(frame) for frame in frames]
    videos = [tensor, tensor.transpose(0, 1).float() / 255, (tensor.float() / 255).bfloat16(), frames,
              frames / 255, images, path, str(path)]
    records = score(videos, "p", fps=fps)
    assert len(records) == 8 and all(like(record, expected) for record in records)
    (flipped,) = score(tensor.flip(0), ["p"], fps=fps)
    assert flipped["score"] != pytest.approx(expected["score"], abs=1e-4)
    assert set(flipped) == set(expected)


def test_the_clients_unusable_videos_say_why(url, clip, expected):
    path, frames, fps = clip
    bad = [np.full((4, 3, 64, 64), 1.5), np.zeros((0, 3, 64, 64)), "nowhere.mp4", ROOT / "README.md",
           np.zeros((4, 3, 400, 300))]
    records = Client(url)([*bad, path], "p", fps=fps)
    assert like(records.pop(), expected)
    for record, why in zip(records, ("not from 0 to 1", "no frames", "no such file", "video_b64: not a video",
                                     "300 x 400 pixels a frame"), strict=True):
        assert math.isnan(record["score"]) and why in record["error"] and record["cot"] is None
        assert "/tmp" not in record["error"] and "\n" not in record["error"]
    for videos, how, error in ((frames, {}, "fps=…"), (frames[0], {"fps": 8}, "not four axes"),
                               (frames[:3].transpose(0, 3, 1, 2), {"fps": 8}, "say layout")):
        with pytest.raises(ValueError, match=error):
            Client(url)(videos, "p", **how)
    with pytest.raises(RuntimeError, match="HTTP 413: .*a body of more than 2,000,000 bytes"):
        Client(url, attempts=1)(np.random.default_rng(0).random((30, 3, 200, 200)), "p", fps=2)


def test_flow_factory(url, clip, expected):
    _, frames, fps = clip
    texts = frames_in(frames)
    body = {"prompt": ["p", "q", "p"], "image": None, "video": [texts, texts, texts[::-1]],
            "condition_images": None, "condition_videos": None, "kwargs": {"fps": fps}}
    status, found = ask(url, "/compute", body)
    assert status == 200 and found["errors"] == [None] * 3 and not found.get("error")
    rewards = torch.tensor(found["rewards"], dtype=torch.float32)
    assert rewards.shape == (3,) and rewards[0] == pytest.approx(expected["standardised"], abs=1e-3)
    assert len(set(rewards.tolist())) == 3
    status, found = ask(url, "/compute", body | {"kwargs": None})
    assert status == 422 and "fps=…" in found["detail"]
    assert ask(url, "/compute", body | {"kwargs": None, "fps": [fps] * 3})[1]["rewards"] == pytest.approx(
        rewards.tolist(), abs=1e-3)


def test_unirl(url, clip, expected):
    path, _, _ = clip
    ids = {"request_id": "r1", "sample_id": "s1", "group_id": None, "source_rank": 3, "policy_version": 7,
           "scorer_version": None, "idempotency_key": "k"}
    turns = [{"text": "p", "video_b64": file_in(path)}, {"text": "p", "video_path": str(path)},
             {"text": "p", "video_path": "inside/v.mp4"}, {"text": "p", "image_b64": "x"}]
    body = {"protocol_version": "1", "requests": [
        {"history": [{"text": "before"}, turn], "required_rewards": ["descore"], "metadata": {"a": 1}, **ids}
        for turn in turns]}
    status, found = ask(url, "/score", body)
    assert status == 200 and found["protocol_version"] == "1" and found["identities"] == [ids] * 4
    for result, errors in list(zip(found["results"], found["errors"], strict=True))[:3]:
        numbers = result["descore"]
        assert errors == {} and all(isinstance(x, float) and math.isfinite(x) for x in numbers.values())
        assert next(iter(numbers.values())) == pytest.approx(expected["standardised"], abs=1e-3)
        assert numbers["score"] == pytest.approx(expected["score"], abs=1e-4)
    assert found["results"][3] == {}
    assert found["errors"][3] == {"descore": "neither video_b64 nor video_path is given"}
    status, health = ask(url, "/health", b"", method="GET")
    assert (status, health["status"], list(health["rewards"])) == (200, "ok", ["descore"])
    assert ask(url, "/rewards", b"", method="GET") == (200, {"rewards": ["descore"]})
    for change in ({"protocol_version": "2"}, {"grad_mode": True},
                   {"requests": [body["requests"][0] | {"required_rewards": ["descore", "other"]}]},
                   {"requests": [body["requests"][0] | {"scorer_version": "3"}]}):
        assert ask(url, "/score", body | change)[0] == 400
    assert ask(url, "/score", {"requests": []})[1]["results"] == []


# ------------------------------------------------------------------------------------------------------------
# As others ask


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def bomb(width, height, depth=8, colour=2):
    """A PNG file that announces so many pixels and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 16)))
            + chunk(b"IEND", b""))


def jpeg():
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    return file.getvalue()


SMALL = png(np.zeros((64, 64, 3), np.uint8))
# Their first header, or what stands in its place, is not that of the picture.
SECOND = {"a second header": SMALL[:8] + bomb(8, 8)[8:33] + SMALL[8:],
          "another chunk first": SMALL[:8] + chunk(b"tEXt", b"k" + bytes(12)) + SMALL[8:]}
BAD_FRAMES = {
    **{name: (file, "it begins as one of another size") for name, file in SECOND.items()},
    "no base64": ("!!!", "frame 0 is no PNG"), "not ASCII": ("é", "no PNG"), "empty": ("", "no PNG"),
    "a bomb": (bomb(100_000, 100_000), "no PNG"), "a smaller one": (bomb(9000, 9000), "9000 x 9000 pixels"),
    "cut off": (SMALL[:40], "no PNG"), "no PNG": (b"GIF89a" + bytes(50), "no PNG"),
    "JPEG": (jpeg(), "no PNG"), "no pixels": (bomb(0, 0), "PNG|sizes"),
    "a text bomb": (SMALL[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 26))) + SMALL[33:], ""),
    "grey of 16 bits": (bomb(16, 16, 16, 0), "a frame is of I;16"),
    "damaged": (SMALL[:45] + b"\xff" * 10 + SMALL[55:], "no PNG")}


@pytest.mark.parametrize("case", BAD_FRAMES)
def test_a_bad_frame_is_its_videos_error(url, clip, case):
    bad, message = BAD_FRAMES[case]
    bad = bad if isinstance(bad, str) else base64.b64encode(bad).decode()
    good = frames_in(clip[1][:4])
    status, found = ask(url, "/compute", {"prompt": ["p"] * 2, "video": [[bad] * 4, good], "fps": 4})
    assert status == 200 and found["errors"][1] is None and math.isfinite(found["rewards"][1])
    if case != "a text bomb":  # which Pillow may pass over
        assert found["rewards"][0] is None and re.search(message, found["errors"][0])
        assert "\n" not in found["errors"][0] and len(found["errors"][0]) < 400


def test_what_prompts_and_clips_may_be(url, clip):
    """A prompt is empty, or long; a clip is a single frame."""
    frames = frames_in(clip[1][:4])
    status, found = ask(url, "/compute", {"prompt": ["", "p" * 1_000_000, "<|im_end|>", "p"], "fps": 4,
                                          "video": [frames, frames, frames, frames[:1]]})
    assert status == 200 and "the prompt has 1,000,000 bytes" in found["errors"][1]
    assert found["rewards"][1] is None
    assert all(math.isfinite(found["rewards"][place]) and not found["errors"][place] for place in (0, 2, 3))


def test_frames_of_two_sizes_and_too_many_are_no_video(url, clip):
    small, large = frames_in([np.zeros((64, 64, 3), np.uint8), np.zeros((64, 80, 3), np.uint8)])
    status, found = ask(url, "/compute", {"prompt": ["p"] * 3, "fps": 4, "video": [
        [small, large] * 2, [], [small] * 41]})
    assert status == 200 and found["rewards"] == [None] * 3
    for error, message in zip(found["errors"], ("frames of", "it has no frames", "41 frames, more than 40")):
        assert message in error


def test_no_dimension_stands_for_the_reward():
    """A model may have dimensions of any name."""
    said = {"reward": 0, "score": 1, "style": 2, "camera": "N/A"}
    record = {**unusable(None), "score": 0.25, "standardised": -0.5, "sub_scores": said}
    assert serving.metrics(record) == {"reward": -0.5, "score": 0.25, "style": 2.0}


@pytest.mark.parametrize(("path", "body"), [
    ("/compute", b""), ("/compute", b"{"), ("/compute", b"\xff\xfe"), ("/compute", b"[" * 100_000),
    ("/compute", b"null"), ("/compute", []), ("/compute", {}), ("/compute", {"prompt": ["p"]}),
    ("/compute", {"prompt": "p", "video": [["x"]], "fps": 4}),
    ("/compute", {"prompt": ["p"], "video": [["x"], ["x"]], "fps": 4}),
    ("/compute", {"prompt": [], "video": [["x"]], "fps": 4}),
    ("/compute", {"prompt": [None], "video": [["x"]], "fps": 4}),
    ("/compute", {"prompt": ["p"], "video": [[7]], "fps": 4}),
    ("/compute", {"prompt": ["p"], "video": None, "fps": 4}),
    ("/compute", {"prompt": ["p"], "video": ["x"], "fps": 4}),
    ("/compute", b'{"prompt": ["p"], "video": [["x"]], "fps": NaN}'),
    ("/compute", b'{"prompt": ["p"], "video": [["x"]], "fps": 1e999}'),
    ("/compute", b'{"prompt": ["\\ud800"], "video": [["x"]], "fps": 4}'),
    ("/compute", {"prompt": ["p"], "video": [["x"]], "fps": -1}),
    ("/compute", {"prompt": ["p"], "video": [["x"]], "fps": True}),
    ("/compute", {"prompt": ["p"], "video": [["x"]], "fps": {"a": 1}}),
    ("/compute", {"prompt": ["p"], "video": [["x"]], "fps": "4" * 10_000}),
    ("/score", {"requests": [{"history": [{"text": "p"}], "required_rewards": ["x" * 10_000]}]}),
    ("/score", {"requests": [{"history": [{"text": "p"}], "required_rewards": ["descore"],
                              "request_id": "x" * 10_000}]}),
    ("/compute", {"prompt": ["p"], "video": [["x"]], "fps": [4, 4]}),
    ("/compute", {"prompt": ["p"], "video": [["x"]], "kwargs": 4}),
    ("/score", {}), ("/score", {"requests": {}}), ("/score", {"requests": [{}]}),
    ("/score", {"requests": [7]}),
    ("/score", {"requests": [{"history": [], "required_rewards": ["descore"]}]}),
    ("/score", {"requests": [{"history": [{"text": 1, "video_b64": "x"}], "required_rewards": ["descore"]}]}),
    ("/score", {"requests": [{"history": [{"text": "p", "video_b64": 1}], "required_rewards": ["descore"]}]}),
    ("/score", {"requests": [{"history": [{"text": "p"}], "required_rewards": "descore"}]}),
    ("/nowhere", {})])
def test_a_body_that_makes_no_sense_is_refused_in_one_line(url, path, body):
    status, found = ask(url, path, body)
    assert 400 <= status < 500 and set(found) == {"detail"} and isinstance(found["detail"], str)
    assert "\n" not in found["detail"] and len(found["detail"]) <= 500 and "Traceback" not in found["detail"]
    assert ask(url, "/health", b"", method="GET")[0] == 200


def test_bodies_have_a_bound(url):
    status, found = ask(url, "/compute", b" " * 2_000_001)
    assert status == 413 and "more than 2,000,000 bytes" in found["detail"]
    status, _ = ask(url, "/compute", b"", {"Content-Length": "99999999999999"})
    assert status == 413
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    try:  # of no length that is said before
        connection.request("POST", "/compute", (b" " * 100_000 for _ in range(30)), encode_chunked=True,
                           headers={"Transfer-Encoding": "chunked", "Content-Type": "application/json"})
    except OSError:
        pass  # the server has hung up
    else:
        assert connection.getresponse().status == 413
    connection.close()
    assert ask(url, "/health", b"", method="GET")[1]["under_way"] == 0


def asked_for(url, **turn):
    body = {"requests": [{"history": [{"text": "p", **turn}], "required_rewards": ["descore"]}]}
    status, found = ask(url, "/score", body)
    assert status == 200
    return found["errors"][0].get("descore")


def test_files_are_opened_below_one_folder_alone(url, clip, tmp_path):
    folder = clip[0].parent.parent
    (folder / "out").symlink_to(tmp_path)
    (folder / "file").symlink_to(ROOT / "tests/golden/four.mp4")
    (folder / "in").symlink_to(clip[0])
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "zero").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    (tmp_path / "v.mp4").write_bytes(clip[0].read_bytes())
    assert asked_for(url, video_path="in") is None
    for path in ("out/v.mp4", "file", "zero", str(tmp_path / "v.mp4"), "../v.mp4", "inside/../../v.mp4",
                 "/etc/passwd", f"{folder}-more/v.mp4", "/"):
        error = asked_for(url, video_path=path)
        assert error == f"{path}: not below the folder that is served"
    long = asked_for(url, video_path="/" + "x" * 100_000)
    assert len(long) < 600
    for path, why in (("none.mp4", "no such file"), ("inside", "no such file"), ("pipe", "no such file"),
                      ("", "no such file"), ("a\0b", "not a path"), ("loop", "not a path"),
                      ("x" * 5000, "")):
        error = asked_for(url, video_path=path)
        assert why in error and str(folder) not in error and "\n" not in error
    assert "both given" in asked_for(url, video_path="in", video_b64="")
    assert "video_b64 is not base64" in asked_for(url, video_b64="!")
    assert "video_b64: not a video" in asked_for(url, video_b64="")
    text = base64.b64encode(b"#EXTM3U\n#EXTINF:2.0,\n/etc/passwd\n").decode()
    assert "video_b64: not a video" in asked_for(url, video_b64=text)


def test_files_have_bounds(url, clip, tmp_path):
    frames = np.zeros((41, 64, 64, 3), np.uint8)
    world.write_video(tmp_path / "long.mp4", frames)
    world.write_video(tmp_path / "large.mp4", np.zeros((4, 400, 300, 3), np.uint8))
    for name, why in (("long", "41 frames, more than 40"), ("large", "300 x 400 pixels a frame, more than")):
        assert why in asked_for(url, video_b64=file_in(tmp_path / f"{name}.mp4"))


def test_what_must_be_decoded_to_be_counted_has_a_bound_before(tmp_path, monkeypatch):
    path, args = tmp_path / "v.avi", argparse.Namespace(max_frames=40, max_pixels=100_000, reader="av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8, width=64, height=64, pix_fmt="yuv420p")
        for _ in range(90):
            container.mux(stream.encode(av.VideoFrame(64, 64, "rgb24")))
        container.mux(stream.encode())
    args.max_frames = 90
    sent.check_file(path, args)
    monkeypatch.setattr(Video, "decode", lambda self: pytest.fail("it is decoded"))
    args.max_frames = 40
    with pytest.raises(DataError, match="90 packets, more than 40 frames have"):
        sent.check_file(path, args)


# ------------------------------------------------------------------------------------------------------------
# Load, and the end


@contextmanager
def in_process(score, settings=None, hosts=(), **changed):
    """An address at which `score` answers in a model's place."""
    args = argparse.Namespace(**{"queue": 8, "max_body": 1000, "max_frames": 40, "max_pixels": 10_000,
                                 "max_videos": 8, "max_work": 10**6, "round": 1, "kept": 0, "window": 0.0,
                                 "fps": 4.0, "unusable": None, "videos": None, "reader": "av"} | changed)
    listening = socket.create_server(("127.0.0.1", 0))
    with tempfile.TemporaryDirectory() as folder:
        service = serving.Service(score, args, settings, Path(folder))
        server = gate.Server(serving.make_app(service, "stub", set(hosts)), Path(folder))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


class Slow:
    """A score of 1 for each video, once it is told to go."""

    def __init__(self):
        self.asked, self.clips, self.go = [], [], threading.Event()

    def __call__(self, videos, prompts):
        self.asked.append(prompts)
        self.clips += videos
        self.go.wait(30)
        return [{**unusable(None), "score": 1.0, "cot": ""}] * len(videos)


def wait_until(happened):
    end = time.time() + 60
    while not happened():
        assert time.time() < end
        time.sleep(0.02)


def health(url):
    return ask(url, "/health", b"", method="GET")[1]


def under_way(url):
    return health(url)["under_way"]


def of_size(size, prompt="p"):
    """A request of so many bytes."""
    body = b'{"prompt": ["%s"], "video": [["%%s"]]}' % prompt.encode()
    return body % (b"A" * (size + 2 - len(body)))


HEAD = b"POST /compute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def connected(url):
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))


def test_the_bodies_of_all_requests_have_a_bound_together(monkeypatch):
    """Four times that of one: of four about 860 bytes each are held, 900 more are too much, 400 are not."""
    score = Slow()
    monkeypatch.setattr(serving, "ROOM_SECONDS", 0.3)
    with in_process(score) as url, ThreadPoolExecutor(8) as pool:
        first = [pool.submit(ask, url, "/compute", of_size(900, name)) for name in "abcd"]
        wait_until(lambda: under_way(url) == 4)
        started = time.monotonic()
        status, found = ask(url, "/compute", of_size(900))
        assert status == 503 and "under way" in found["detail"] and time.monotonic() - started >= 0.3
        assert ask(url, "/compute", of_size(1001))[0] == 413
        first.append(pool.submit(ask, url, "/compute", of_size(400)))
        wait_until(lambda: under_way(url) == 5)
        score.go.set()
        assert all(future.result(60) == (200, first[0].result()[1]) for future in first)
        for _ in range(5):  # what is answered is held no longer
            assert ask(url, "/compute", of_size(1000))[0] == 200


def test_who_asks_again_at_once_is_told_when_there_is_room(monkeypatch):
    """Not before: three tries would be gone in a moment."""
    monkeypatch.setattr(serving, "ROOM_SECONDS", 60)
    score = Slow()
    with in_process(score) as url, ThreadPoolExecutor(8) as pool:
        first = [pool.submit(ask, url, "/compute", of_size(900, name)) for name in "abcd"]
        wait_until(lambda: under_way(url) == 4)
        last = pool.submit(ask, url, "/compute", of_size(900))
        wait_until(lambda: health(url)["coming"] == 1)
        time.sleep(0.3)
        assert not last.done()
        score.go.set()
        assert last.result(30)[0] == 503 and all(future.result(30)[0] == 200 for future in first)
        assert ask(url, "/compute", of_size(900))[0] == 200


def test_bodies_that_come_side_by_side_make_room_for_each_other(monkeypatch):
    """Eight of 900 bytes, which come in three parts: four can be held, and four are."""
    monkeypatch.setattr(serving, "ROOM_SECONDS", 0.1)
    score, statuses = Slow(), []
    with in_process(score) as url:
        clients = [connected(url) for _ in range(8)]
        bodies = [of_size(900, name) for name in "abcdefgh"]
        for start, end in ((0, 600), (600, 800), (800, 900)):
            for client, body in zip(clients, bodies):
                client.sendall((b"" if start else HEAD % 900) + body[start:end])
            wait_until(lambda: under_way(url) or health(url)["coming"] == 8)
            time.sleep(0.2)
        wait_until(lambda: under_way(url) == 4)
        score.go.set()
        for client in clients:
            client.settimeout(30)
            statuses.append(client.recv(1000).split()[1])
            client.close()
    assert sorted(statuses) == [b"200"] * 4 + [b"503"] * 4


def test_who_hangs_up_leaves_nothing_behind():
    """Amid the body, and before the answer."""
    score = Slow()
    with in_process(score) as url:
        for sent, arrived in ((of_size(1000)[:900], lambda: health(url)["coming"]),
                              (of_size(1000), lambda: under_way(url))):
            for _ in range(6):  # of which four may be held
                with connected(url) as client:
                    client.sendall(HEAD % 1000 + sent)
                    wait_until(arrived)
                wait_until(lambda: health(url)["coming"] == under_way(url) == 0)
        score.go.set()
        for _ in range(5):
            assert ask(url, "/compute", of_size(1000))[0] == 200


@pytest.mark.parametrize("start", [b'{"prompt": [], "video": [%s[]]}', b'{"requests": [%s{}]}',
                                   b'{"prompt": [], "video": [], "kwargs": {"a": [%s[]]}}'])
def test_a_body_of_many_small_values_is_not_parsed(start):
    path = "/compute" if b"prompt" in start else "/score"
    with in_process(Slow(), max_body=10_000_000) as url:
        for value in (b"[],", b"{},", b"1,"):
            status, found = ask(url, path, start % (value * 100_000))
            assert status == 413 and found["detail"].startswith("a body of more than 100,000 values;")


def test_beyond_its_queue_it_is_busy_and_it_ends_when_what_it_has_is_done(scorer_dir, clip):
    process, url = serve(scorer_dir, "--queue", 1, "--window", 1.5, "--accept-any", "--max-new-tokens", 6,
                         "--fps", 4, "--unusable", "-2.5", "--kept", 0)
    body = {"prompt": ["p", "p"], "video": [frames_in(clip[1]), ["bad"]]}

    def wait_for(held):
        wait_until(lambda: under_way(url) == held)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, url, "/compute", body)
        wait_for(1)
        status, found = ask(url, "/compute", body)
        assert status == 503 and "1 requests are under way" in found["detail"]
        patient = pool.submit(Client(url, timeout=60), clip[1], "p", fps=4)  # asks again until there is room
        status, found = first.result(60)
        assert status == 200 and math.isfinite(found["rewards"][0]) and found["rewards"][1] == -2.5
        assert patient.result(60)[0]["error"] is None
        wait_for(0)
        assert "start with --videos DIR" in asked_for(url, video_path="v.mp4")
        last = pool.submit(ask, url, "/compute", body)
        wait_for(1)
        os.kill(process.pid, signal.SIGTERM)
        assert last.result(60) == (200, found)
    done = process.wait(60)
    assert done.stderr.startswith("refused: 503, 1 so far: 1 requests are under way") and not done.returncode
    with pytest.raises(RuntimeError, match="refused"):
        Client(url, attempts=2)(clip[1], "p", fps=4)


@pytest.mark.parametrize(("more", "message"), [
    (["--model", "nowhere"], "nowhere: no such directory"),
    (["--videos", "nowhere"], "nowhere: no such folder"),
    (["--model", ROOT / "toy/backbone"], "has no trained"), (["--fps", "nan"], "not a number above 0"),
    (["--queue", 0], "not a whole number of 1"), (["--port", 70_000], "error: --port 70000 is above 65535")])
def test_a_start_that_makes_no_sense_ends_in_one_line(scorer_dir, more, message):
    done = run("-m", "tools.serve", "--model", scorer_dir, "--port", 0, *more, check=False)
    assert done.returncode and message in done.stderr and "Traceback" not in done.stderr


def test_two_do_not_share_a_port(scorer_dir, url):
    done = run("-m", "tools.serve", "--model", scorer_dir, "--port", url.rpartition(":")[2], check=False)
    assert done.returncode == 1 and "in use" in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------------------
# What a trainer copies, and what docs/in-a-trainer.md says


def test_the_client_is_one_file_that_needs_numpy_alone(tmp_path, url, clip, expected):
    source = (ROOT / "tools/client.py").read_text()
    imported = set()
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        imported |= {name.split(".")[0] for name in names}
    assert imported - set(sys.stdlib_module_names) == {"numpy"}
    (tmp_path / "client.py").write_text(source)
    np.save(tmp_path / "frames.npy", clip[1])
    code = (f"import sys, numpy; from client import Client; "
            f"print(Client({url!r})(numpy.load('frames.npy'), 'p', fps=4)[0]['score']); "
            f"assert 'torch' not in sys.modules and 'data' not in sys.modules")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "no_proxy": ""}
    out = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert float(out) == pytest.approx(expected["score"], abs=1e-4)
    for bad in ("127.0.0.1:8000", "file:///etc/passwd"):
        with pytest.raises(ValueError, match="is no address"):
            Client(bad)


# What Python 3.8 does not have, of what one might write here.
LATER = {"to_thread", "cache", "pairwise", "removeprefix", "removesuffix", "TimeoutError", "strict"}


@pytest.mark.parametrize("name", ["client.py", "adapters.py"])
def test_what_is_copied_into_a_trainer_asks_for_python_3_8_alone(name):
    tree = ast.parse((ROOT / "tools" / name).read_text(), feature_version=(3, 8))
    assert re.search(r"Python\s3\.8 or later", ast.get_docstring(tree))
    nodes = list(ast.walk(tree))
    assert any(isinstance(node, ast.ImportFrom) and node.module == "__future__"
               and node.names[0].name == "annotations" for node in nodes)
    words, hints = set(), set()  # hints are never evaluated
    for node in nodes:
        words |= {getattr(node, field, None) for field in ("id", "attr", "arg", "name")}
        for hint in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            hints |= set(ast.walk(hint)) if isinstance(hint, ast.AST) else set()
    assert not words & LATER
    unions = [node for node in nodes if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)]
    assert not set(unions) - hints  # of types, or of dicts


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (64, 33)])
def test_the_clients_png_files_lose_nothing(size):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(png(picture))) as image:
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), picture)


def test_the_python_of_the_page(url, scorer_dir, clip, expected, tmp_path):
    in_process, _, served = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    np.save(tmp_path / "frames.npy", clip[1].transpose(0, 3, 1, 2)[None])
    (tmp_path / "client.py").write_text((ROOT / "tools/client.py").read_text())
    given = f"import numpy; frames, prompts = numpy.load({str(tmp_path / 'frames.npy')!r}) / 255, ['p']\n"
    (tmp_path / "one.py").write_text(given + in_process.replace("runs/rl", str(scorer_dir)))
    assert run(tmp_path / "one.py").stdout.endswith(" None\n")  # a score, a place, a CoT, and no error
    (tmp_path / "two.py").write_text(given + served.replace("http://127.0.0.1:8000", url)
                                     + "print(scorer(frames, prompts, fps=4)[0]['score'])\n")
    assert float(run(tmp_path / "two.py").stdout) == pytest.approx(expected["score"], abs=1e-4)
