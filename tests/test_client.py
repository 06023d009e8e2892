"""What the client sends, and what it does with servers that are busy, away, slow, or none of ours."""

import copy
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import signal
import socket
import ssl
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from data import VideoSettings, smart_nframes
from tools import client
from tools.client import Client, looked_at, unusable

LOOKS = {"fps": 2.0, "min_frames": 4, "max_frames": 768}
RECORD = {**unusable(None), "score": 1.5, "cot": "a"}
CLIP = np.zeros((4, 3, 8, 8))


def http(content, code=200, more=b""):
    """An answer, of bytes or of what becomes JSON."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n%s\r\n%s" % (code, len(body), more, body)


def records(*found):
    return http({"records": list(found)})


@contextmanager
def stub(answer, looks=LOOKS):
    """The address of a server that says how it looks at videos, and else what `answer` makes of a body: parts
    of an answer. Nothing more comes when it has said a None."""

    def serve(connection):
        with connection, connection.makefile("rb") as file:
            head = b"".join(iter(file.readline, b"\r\n"))
            length = int((re.findall(rb"Content-Length: (\d+)", head) or [0])[0])
            body = file.read(length)
            parts = [http({"sampling": looks})] if b" /health " in head else answer(json.loads(body))
            try:
                for part in parts:
                    if part is None:
                        over.wait(30)
                    else:
                        connection.sendall(part)
            except OSError:
                pass  # the client has hung up

    def listen():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=[connection], daemon=True).start()

    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        over.set()
        listening.shutdown(socket.SHUT_RDWR)


class Clock:
    """Time for the client, which sleeps without any passing."""

    def __init__(self):
        self.pauses = []

    def monotonic(self):
        return time.monotonic() + sum(self.pauses)

    def sleep(self, seconds):
        self.pauses.append(seconds)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(client, "time", Clock())
    return client.time


def test_a_busy_server_is_asked_until_it_has_room(clock):
    """However few attempts there are; it says how long to wait, and not all come back at once."""
    asked = []

    def answer(body):
        asked.append(1)
        yield records(RECORD) if len(asked) > 30 else http(b"full", 503, b"Retry-After: 11\r\n")

    state = random.getstate()
    with stub(answer) as url:
        (found,) = Client(url, timeout=600, attempts=1)(CLIP, "p", fps=4)
    assert found == RECORD and len(asked) == 31
    assert all(11 <= pause <= 11 * 1.5 for pause in clock.pauses) and len(set(clock.pauses)) == 30
    assert random.getstate() == state


def test_a_server_that_stays_busy_is_left_when_the_time_is_over(clock):
    full = stub(lambda body: [http(b"full", 503)])
    with full as url, pytest.raises(RuntimeError, match=f"{url}/compute: HTTP 503: full"):
        Client(url, timeout=100, attempts=1)(CLIP, "p", fps=4)
    assert sum(clock.pauses) == pytest.approx(100, abs=2) and max(clock.pauses) <= 8 * 1.5
    assert clock.pauses[0] < 1 and clock.pauses[8] >= 8


def test_who_cannot_be_reached_is_tried_so_often(clock):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RuntimeError, match=f"{url}/health: .*refused"):
        Client(url, attempts=7)(CLIP, "p", fps=4)
    assert len(clock.pauses) == 6


def slowly(text):
    for place in range(len(text)):
        yield text[place : place + 1]
        time.sleep(0.1)


BAD = {
    # what is answered → how often it is asked, what the error says
    "nothing": ([b""], 3, "closed connection"),
    "no HTTP": ([b"nonsense\r\n"], 3, "nonsense"),
    "cut": ([b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"], 3, "IncompleteRead"),
    "silence": ([None], 1, "no answer within 0.5 seconds"),
    "a head that trickles": (slowly(b"HTTP/1.1 200 OK" + b" " * 60), 1, "no answer within 0.5"),
    "a body that trickles": ([b"HTTP/1.1 200 OK\r\n\r\n", *[b" ", b" "], None], 1, "no answer within 0.5"),
    "a long body that trickles": (slowly(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"), 1, "within 0.5"),
    "an error": ([http(b"why?", 500)], 1, "HTTP 500: why?"),
    "another place": ([http(b"", 302, b"Location: /\r\n")], 1, "HTTP 302"),
    "no JSON": ([http(b"<html>hello")], 1, "not an answer of tools.serve: <html>hello"),
    "no UTF-8": ([http(b"\xff\xfe\x00")], 1, "not an answer"),
    "brackets": ([http(b"[" * 100_000)], 1, "not an answer"),
    "a list": ([http([1])], 1, "not an answer"),
    "null": ([http(None)], 1, "not an answer"),
    "no records": ([http({"rewards": [1.0]})], 1, "not an answer"),
    "records of none": ([records()], 1, "not an answer"),
    "two records": ([records(RECORD, RECORD)], 1, "not an answer"),
    "a number": ([records(1.5)], 1, "not an answer"),
    "half a record": ([records({"score": 1.5, "error": None})], 1, "not an answer"),
    "no score": ([records({**RECORD, "score": None})], 1, "not an answer"),
    "a word for a score": ([records({**RECORD, "score": "high"})], 1, "not an answer"),
    "NaN for a score": ([records({**RECORD, "score": math.nan})], 1, "not an answer"),
    "infinity for a score": ([records({**RECORD, "score": math.inf})], 1, "not an answer"),
    "a word for a scale": ([records({**RECORD, "standardised": "high"})], 1, "not an answer"),
    "NaN on a scale": ([records({**RECORD, "standardised": math.nan})], 1, "not an answer"),
    "a number for an error": ([records({**unusable(None), "score": None, "error": 0})], 1, "not an answer"),
    "a negative chunk": ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n"], 3, ""),
    "a superscript of seconds": ([http(b"full", 503, b"Retry-After: \xb2\r\n")], None, "HTTP 503: full"),
    "a score and an error": ([records({**RECORD, "error": "no"})], 1, "not an answer"),
}


@pytest.mark.parametrize("case", BAD)
def test_every_failure_is_one_error_with_the_address(case, monkeypatch):
    answer, times, message = BAD[case]
    if times != 1:
        monkeypatch.setattr(client, "time", Clock())
    asked = []
    with stub(lambda body: asked.append(1) or answer) as url:
        timeout = 0.5 if "0.5" in message else 60
        with pytest.raises(RuntimeError, match=f"^{url}/compute: .*{re.escape(message)}"):
            Client(url, timeout=timeout, attempts=3)(CLIP, "p", fps=4)
    assert times is None or len(asked) == times


@pytest.mark.parametrize("looks", [{}, {**LOOKS, "fps": "2"}, {**LOOKS, "max_frames": 0}, 7,
                                   {**LOOKS, "min_frames": math.inf}, {**LOOKS, "fps": 10**400}])
def test_a_service_that_does_not_say_how_it_looks_is_not_ours(looks):
    with stub(None, looks) as url, pytest.raises(RuntimeError, match=f"^{url}/health: not an answer"):
        Client(url)(CLIP, "p", fps=4)


def named(asked, name):
    """A server's answers: the number that is the prompt, as a score."""

    def answer(body):
        asked.append(name)
        yield records({**RECORD, "score": float(body["prompt"][0])})

    return answer


def test_several_servers_share_the_videos_and_stand_in_for_each_other(clock):
    asked, prompts = [], [str(number) for number in range(9)]
    videos = [CLIP] * 9
    with stub(named(asked, "a")) as a, stub(named(asked, "b")) as b:
        score = Client([a, b + "/"], attempts=1)

        def scores():
            return [record["score"] for record in score(videos, prompts, fps=4)]

        assert scores() == list(range(9)) and asked.count("a") in (4, 5)
        with stub(lambda body: [http(b"full", 503)]) as full:
            score.urls[0] = full
            assert scores() == list(range(9))
        assert scores() == list(range(9))  # it is gone
        assert not clock.pauses  # while another has room
        score.urls[1] = full
        with pytest.raises(RuntimeError, match=f"^{full}/compute: .*refused"):
            scores()
    for urls in ([], ["127.0.0.1:8000"], [a, "file:///etc/passwd"], "http://", "http://:80", "http://a..b",
                 "http://[::1", "http://a:port", "http://127.0.0.1:99999"):
        with pytest.raises(ValueError, match="is no address"):
            Client(urls)


def test_servers_that_stand_in_for_each_other_are_equal():
    def of(model, score):
        told = b"DeScore-Made-By: " + model + b"\r\n"
        return lambda body: [http({"records": [{**RECORD, "score": score}]}, more=told)]

    models = iter([b"m", b"n"])
    with stub(of(b"m", 1.0)) as a, stub(of(b"m", 1.0)) as b, stub(of(b"n", 5.0)) as c:
        assert [record["score"] for record in Client([a, b])([CLIP] * 4, "p", fps=4)] == [1.0] * 4
        score = Client([a, c])
        for _ in range(2):
            with pytest.raises(RuntimeError, match="/compute: has another model than 127.0.0.1:"):
                score([CLIP] * 2, "p", fps=4)
        score.urls = [c, c]  # a is started anew, with the model of c
        assert score([CLIP] * 2, "p", fps=4)[0]["score"] == 5.0
    with stub(lambda body: of(next(models), 1.0)(body)) as one:  # a single one may change its model
        score = Client(one)
        assert [score(CLIP, "p", fps=4)[0]["score"] for _ in range(2)] == [1.0] * 2
    for timeout in (math.nan, 0, -1):
        with pytest.raises(ValueError, match="a time-out of"):
            Client(timeout=timeout)


def test_another_server_has_time_left_where_one_never_answers():
    with stub(lambda body: [None]) as hung, stub(named([], "b")) as b:
        found = Client([b, hung], timeout=1.0)([CLIP] * 3, ["0", "1", "2"], fps=4)
    assert [record["score"] for record in found] == [0, 1, 2]


def test_what_is_no_file_is_a_videos_error(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    score = Client("http://127.0.0.1:1", attempts=1)  # which is not asked
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero", tmp_path / "none", "a\0b"):
        (record,) = score(path, "p")
        assert record["error"] == f"{path}: no such file" and math.isnan(record["score"])


def test_a_client_goes_on_in_a_process_that_was_forked():
    with stub(named([], "a")) as url:
        score = Client(url)
        score(CLIP, "1", fps=4)
        draw = score.dice.random
        asking = multiprocessing.get_context("fork").SimpleQueue()
        started = os.fork()
        if not started:
            signal.alarm(20)
            asking.put((score(CLIP, "2", fps=4)[0]["score"], draw()))
            os._exit(0)
        assert os.waitpid(started, 0)[1] == 0
        found, drawn = asking.get()
        assert found == 2 and drawn != draw()


def test_a_client_may_be_copied_and_sent_to_another_process():
    with stub(named([], "a")) as url:
        score = Client([url], timeout=30, parallel=2, attempts=3)
        score(CLIP, "1", fps=4)
        for other in (copy.deepcopy(score), pickle.loads(pickle.dumps(score))):
            assert other(CLIP, "2", fps=4)[0]["score"] == 2
            assert (other.urls, other.timeout, other.parallel, other.attempts) == ([url], 30, 2, 3)


def test_another_model_may_be_served_at_an_address():
    """One that looks at other frames refuses what was chosen for the first, but that alone."""
    looks = dict(LOOKS)

    def answer(body):
        return [records(RECORD) if body["sampling"] == looks else http(b"chosen by another", 422)]

    with stub(answer, looks) as url:
        score = Client(url)
        assert score(CLIP, "p", fps=4) == [RECORD]
        looks["fps"] = 4.0
        with pytest.raises(RuntimeError, match="chosen by another"):
            score(CLIP, "p", fps=4)
        assert score(CLIP, "p", fps=4) == [RECORD]


@pytest.mark.parametrize("timeout", [math.inf, 1e12])
def test_who_waits_for_ever_waits(timeout, monkeypatch):
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    with stub(lambda body: [records(RECORD)]) as url:
        assert Client(url, timeout=timeout)(CLIP, "p", fps=4) == [RECORD]
    assert not failed


def test_those_frames_are_sent_that_the_model_looks_at():
    sent = []
    frames = np.arange(81, dtype=np.uint8)[:, None, None, None].repeat(3, 3)  # (81, 1, 1, 3)
    for looks, count in ((LOOKS, 10), ({**LOOKS, "max_frames": 6}, 6), (None, 81)):
        with stub(lambda body: sent.append(body) or [records(RECORD)], looks) as url:
            Client(url)(frames, "p", fps=16, layout="THWC")
        body = sent.pop()
        places = np.linspace(0, 80, count).round()
        pictures = [client.base64.b64encode(client.png(frames[int(place)])).decode() for place in places]
        assert body["video"] == [pictures] and body["fps"] == 16 and body.get("sampling") == looks
        assert body.get("seconds") == (looks and [[place / 16 for place in places]])


RATES = (8, 16, 24, 23.976, 30000 / 1001, 0.5, 1000)


@pytest.mark.parametrize("looks", [(2.0, 4, 768), (1.7, 5, 9), (24.0, 1, 2), (0.01, 3, 31), (4, 4, 10**6)])
def test_the_client_chooses_frames_as_the_model_does(looks):
    settings = VideoSettings(*map(float, looks[:1]), *looks[1:])
    assert looked_at(0, 8.0, *looks) == [] and looked_at(1, 8.0, *looks) == [0]
    for total in (*range(2, 260), *range(260, 2100, 67), 5000, 60_001):
        for count, rate in {smart_nframes(total, rate, settings): rate for rate in RATES}.items():
            expected = torch.linspace(0, total - 1, count).round().long().tolist()
            found = looked_at(total, rate, *looks)
            if found is None:
                assert total * count > 2_000_000
            else:
                assert found == expected and len(set(found)) == count


def test_a_video_that_cannot_be_scored_is_no_failure():
    error = {**unusable("damaged"), "score": None}
    with stub(lambda body: [records(error)]) as url:
        (found,) = Client(url)(CLIP, "p", fps=4)
    assert math.isnan(found["score"]) and found["error"] == "damaged"


@pytest.mark.parametrize("url", ["http://somebody:pa55word@host:8000", "https://host/?key=pa55word"])
def test_a_secret_in_an_address_is_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match="tools.serve does not know") as caught:
        Client(url)
    assert "pa55word" not in str(caught.value) and "somebody" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://", "http://host:99999", "http://a..b:80", "http://[::1", "http://h:x"])
def test_an_address_that_cannot_be_asked_is_refused(url):
    with pytest.raises(ValueError, match="is no address such as"):
        Client(url)


def test_what_the_environment_says_of_proxies_is_not_for_a_server_and_of_certificates_is_named(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "socks5://127.0.0.1:1")
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    with stub(lambda body: [records(RECORD)]) as url:
        assert Client(url, attempts=1)(CLIP, "p", fps=4) == [RECORD]
    asked = []

    def refuse(self):
        asked.append(1)
        error = ssl.SSLCertVerificationError(1, "certificate verify failed")
        error.verify_message = "unable to get local issuer certificate"
        raise error

    monkeypatch.setattr(client.http.client.HTTPSConnection, "connect", refuse)
    with pytest.raises(RuntimeError, match=r"local issuer certificate \(by .* SSL_CERT_FILE"):
        Client("https://host:1")(CLIP, "p", fps=4)
    assert len(asked) == 1
