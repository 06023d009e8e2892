"""Endpoints that refuse, cut off, count, echo and vanish: what is kept, asked again, and what ends all."""

import http.server
import json
import os
import signal
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from data import DIMENSIONS, DataError, follows_format, read_pairs
from tools import annotate, asking, endpoint, journal
from tools.completion import Refused, Unsound, read_completion
from tools.endpoint import Endpoint

SCORES = dict.fromkeys(DIMENSIONS, 1)
ANSWER = f'<answer>{json.dumps({"dimensional_scores": SCORES})}</answer>'
COT = f"<think>It moves.</think>\n{ANSWER}"
KEY = "sk-a/b+c-0123456789"


def choice(content=COT, finish="stop", **more):
    return {"index": 0, "finish_reason": finish, "message": {"content": content, **more}}


def completion(*args, **more):
    return 200, {}, {"choices": [choice(*args, **more)]}


class Server(http.server.ThreadingHTTPServer):
    """Answers each question by `answer(text, body)`: a status, headers, and an object or a text."""

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.asked, self.seen = answer, [], []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"][0]["text"]
        self.server.asked.append(text)
        self.server.seen.append((time.monotonic(), self.path, self.headers.get("Authorization"), body))
        status, headers, content = self.server.answer(text, body)
        content = content if isinstance(content, str) else json.dumps(content)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content.encode())}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *args):
        pass

    def handle(self):
        try:
            super().handle()
        except OSError:  # who asked has gone
            pass


@pytest.fixture
def serve():
    servers = []

    def start(answer):
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class Desk:
    """Annotates pairs of videos that nobody decodes: what is asked about one is its name."""

    def __init__(self, folder, monkeypatch, capsys):
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.out, self.written = folder / "out.jsonl", folder / "out.jsonl.cots"

    def pairs(self, count):
        lines = []
        for number in range(count):
            names = {f"video_{side}": f"{number}{side}.mp4" for side in "ab"}
            for name in names.values():
                (self.folder / name).write_bytes(name.encode())
            lines.append(json.dumps({"prompt": f"prompt {number}", "preference": "A", **names}) + "\n")
        (self.folder / "pairs.jsonl").write_text("".join(lines))

    def __call__(self, url, *flags):
        """An exit code, or what ended it; and all that was printed."""
        words = ["annotate", self.folder / "pairs.jsonl", self.out, "--api", url, "--api-model", "m", *flags]
        self.monkeypatch.setattr(sys, "argv", list(map(str, words)))
        try:
            annotate.main()
        except SystemExit as end:
            code = end.code
        except (DataError, KeyboardInterrupt) as error:
            code = error.with_traceback(None)  # which holds what is open
        said = self.capsys.readouterr()
        return code, said.out + said.err

    def kept(self):
        """What is in OUT: the numbers of its pairs."""
        return [int(pair.prompt.split()[1]) for pair in read_pairs(self.out)]


@pytest.fixture
def desk(tmp_path, monkeypatch, capsys):
    def question(self, videos, prompt):
        return [{"type": "text", "text": " ".join(Path(video).name for video in videos.values())}], {}

    monkeypatch.setattr(annotate.Api, "question", question)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = Desk(tmp_path, monkeypatch, capsys)
    made.pairs(4)
    return made


# ------------------------------------------------------------------------------------------------------------
# The CoT of a completion

THOUGHT = [{"type": "thinking", "thinking": [{"type": "text", "text": "It moves."}]}]
PARTS = [{"type": "text", "text": ANSWER[:9]}, {"type": "text", "text": {"value": ANSWER[9:]}}]
OBJECT = {"dimensional_scores": SCORES}
WHOLE = {
    "beside it, as reasoning_content": choice(ANSWER, reasoning_content="It moves."),
    "beside it, as reasoning": choice(ANSWER, reasoning="\nIt moves.\n", reasoning_content=None),
    "in tags already": choice(COT, reasoning_content="It moves."),
    "in its own tags": choice(ANSWER, reasoning="<think>It moves.</think>"),
    "an empty block": choice(f"<think>\n</think>{ANSWER}", reasoning="It moves."),
    "opened by the prompt": choice(f"It moves.</think>\n{ANSWER}"),
    "closed in the content": choice(f"</think>\n{ANSWER}", reasoning="It moves."),
    "parts": choice(PARTS, reasoning="It moves."),
    "parts with a thought": choice([*THOUGHT, *PARTS]),
    "one part": choice({"type": "text", "text": COT}),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_thought_goes_back_between_its_tags_once(case):
    found = read_completion(json.dumps({"choices": [WHOLE[case]]}))
    assert found == {"cot": COT, "truncated": False} and follows_format(found["cot"])


@pytest.mark.parametrize("finish", ["abort", "error"])
def test_an_answer_that_was_broken_off_is_asked_for_again(serve, finish):
    answers = iter([completion(COT[:9], finish), completion(COT[:9], finish), completion()])
    server = serve(lambda text, body: next(answers))
    patient = Endpoint(server.url, "m", retries=2)
    patient.pause = lambda seconds: None
    assert asks_once(patient)["cot"] == COT and len(server.asked) == 3
    server.answer = lambda text, body: completion(COT[:9], finish)
    with pytest.raises(endpoint.Failed, match=f"1 attempt: an answer whose finish_reason is {finish} "):
        asks_once(Endpoint(server.url, "m", retries=0))


@pytest.mark.parametrize("ids", ["x", {}, 5, ["a"], [None], [1.5], [True], [-1], [2**31]])
def test_what_are_no_token_ids_are_no_answer(ids):
    whole = {"choices": [choice()], "prompt_token_ids": [3, 2]}
    assert read_completion(json.dumps(whole))["prompt_ids"] == [3, 2]
    with pytest.raises(Unsound, match="are no token ids"):
        read_completion(json.dumps(whole | {"prompt_token_ids": ids}))


AS_WRITTEN = f"It moves.</think>\n{ANSWER}"


def test_what_is_to_be_as_written_is_not_put_together():
    def read(*args, **more):
        return read_completion(json.dumps({"choices": [choice(*args, **more)]}), as_written=True)

    assert read(AS_WRITTEN) == {"cot": AS_WRITTEN, "truncated": False}
    assert read(AS_WRITTEN, "length") == {"cot": AS_WRITTEN, "truncated": True}
    for beside in ({"reasoning": "It moves."}, {"reasoning_content": "It moves."}):
        with pytest.raises(endpoint.Refused, match="without --reasoning-parser"):
            read(ANSWER, **beside)
    for finish in (None, "tool_calls", 5, ["length"], "eos"):
        with pytest.raises(Unsound, match="an answer whose finish_reason is"):
            read(AS_WRITTEN, finish)
    assert read(AS_WRITTEN, "max_tokens")["truncated"]
    with pytest.raises(endpoint.Refused, match="content_filter"):
        read(AS_WRITTEN, "content_filter")


def test_a_completion_is_read_as_it_is_meant():
    def read(*choices):
        return read_completion(json.dumps({"choices": choices}))

    others = [{**choice("b"), "index": 2}, {**choice("c"), "index": 1}, choice("a")]
    assert read(*others)["cot"] == "a"
    assert read({"message": {"content": "first"}}, {"message": {"content": "x"}})["cot"] == "first"
    assert json.loads(read(choice(OBJECT))["cot"]) == OBJECT
    assert read(choice(OBJECT, reasoning="R"))["cot"] == f"<think>R</think>\n{json.dumps(OBJECT)}"
    speaks_of_tags = read(choice(ANSWER, reasoning="I write <answer> behind </think>."))["cot"]
    assert follows_format(speaks_of_tags) and "I write answer behind think." in speaks_of_tags
    assert read(choice("<think>so f", "length")) == {"cot": "<think>so f", "truncated": True}
    assert read(choice(None, "length", reasoning="so f")) == {"cot": "<think>so f", "truncated": True}
    assert read(choice("<think>so f", "LENGTH"))["truncated"]
    assert read(choice("a\ud800"))["cot"] == "a?"


NO_ANSWER = {
    "null": choice(None), "empty": choice(" \n"), "no parts": choice([]), "a thought alone": choice(THOUGHT),
    "filtered": choice("It is", "content_filter"), "refusal": choice(None, refusal="I must not look"),
    "a part that refuses": choice([{"type": "refusal", "refusal": "I must not look"}]),
}


@pytest.mark.parametrize("case", NO_ANSWER)
def test_what_is_no_answer_is_refused(case):
    with pytest.raises(Refused, match="must not look" if "refus" in case else "refused: "):
        read_completion(json.dumps({"choices": [NO_ANSWER[case]]}))


# ------------------------------------------------------------------------------------------------------------
# What is left out, kept and asked again

REFUSALS = {str(status): (status, {}, {"error": {"message": "not this one"}})
            for status in (400, 403, 422)} | {name: (200, {}, {"choices": [NO_ANSWER[name]]})
                                              for name in ("null", "filtered", "refusal")}


@pytest.mark.parametrize("flags", [["--parallel", 1], ["--scores"], ["--scores", "--together"]])
@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_video_is_left_out_and_asked_about_again_alone(serve, desk, case, flags):
    if flags != ["--scores"] and case not in ("400", "refusal"):
        pytest.skip("one of each kind is enough")
    both = json.dumps({"video_1_scores": SCORES, "video_2_scores": SCORES})
    good = completion(both if "--together" in flags else COT)
    server = serve(lambda text, body: REFUSALS[case] if "1b" in text else good)
    for start in (1, 2):
        code, said = desk(server.url, *flags)
        assert code == 1 and desk.kept() == [0, 2, 3] and desk.written.is_file()
        assert "left out: " in said and "1b.mp4" in said and "1 left out, the endpoint has no answer" in said
        assert len(server.asked) == (4 if "--together" in flags else 8) + start - 1
    server.answer = lambda text, body: good
    code, _ = desk(server.url, *flags)
    assert code == 0 and desk.kept() == [0, 1, 2, 3] and not desk.written.exists()
    assert all("1b.mp4" in text for text in server.asked[-2:])


def test_answers_stay_where_a_video_is_missing(serve, desk):
    server = serve(lambda text, body: completion())
    (desk.folder / "1b.mp4").unlink()
    code, said = desk(server.url)
    assert code == 1 and desk.kept() == [0, 2, 3] and "1 left out, a video is missing" in said
    (desk.folder / "1b.mp4").write_bytes(b"1b.mp4")
    code, _ = desk(server.url)
    assert code == 0 and desk.kept() == [0, 1, 2, 3] and not desk.written.exists()
    assert sorted(server.asked[6:]) == ["1a.mp4", "1b.mp4"]


@pytest.mark.parametrize("status", [401, 404])
def test_what_no_question_mends_ends_the_command_and_answers_stay(serve, desk, status):
    def answer(text, body):
        return (status, {}, "no") if "2a" in text else completion()

    server = serve(answer)
    code, said = desk(server.url, "--parallel", 1)
    assert isinstance(code, DataError) and f"HTTP {status}" in str(code) and len(server.asked) == 5
    assert not desk.out.exists() and "has 4 of 8 videos" in said
    server.answer = lambda text, body: completion()
    assert desk(server.url)[0] == 0 and len(server.asked) == 5 + 4


def test_refusals_and_failures_have_a_bound(serve, desk):
    desk.pairs(20)
    server = serve(lambda text, body: (400, {}, "never") if text[0] in "123" else completion())
    code, said = desk(server.url, "--parallel", 1)
    assert "6 of 40 questions have no answer, more than --max-skipped 0.01 allows; the last: " in str(code)
    assert said.count("left out: ") == 6 and not desk.out.exists()
    code, _ = desk(server.url, "--max-skipped", 0.7)
    assert code == 1 and desk.kept() == [0, 4, 5, 6, 7, 8, 9]
    server.answer = lambda text, body: (503, {}, "down")
    server.asked.clear()
    code, _ = desk(server.url, "--retries", 0, "--parallel", 1)
    assert "5 failures in a row; the last: " in str(code) and "HTTP 503" in str(code)
    assert len(server.asked) == 5


def test_answers_of_no_use_are_counted_kept_apart_and_asked_for_alone(serve, desk):
    bad = {"0a": completion("<think>It", "length"), "1a": completion("It is fine."), "2b": completion(ANSWER)}

    def answer(text, body):
        return bad.get(text[:2], completion())

    server = serve(answer)
    code, said = desk(server.url)
    assert code == 1 and desk.kept() == [3] and "3 left out, an answer is of no use" in said
    for words in ("1 cut off", "1 without scores that can be read", "1 without a thought"):
        assert words in said
    assert desk.written.read_text().count("\n") == 1 + 8  # they were paid for
    code, said = desk(server.url, "--scores")  # references need no thought
    assert desk.kept() == [2, 3] and "answers without a thought, which stage 1 needs: " in said
    assert sorted(server.asked[8:]) == ["0a.mp4", "1a.mp4"]
    bad.clear()
    assert desk(server.url, "--max-new-tokens", 9000)[0] == 0
    assert sorted(server.asked[10:]) == ["0a.mp4", "1a.mp4", "2b.mp4"]
    assert server.seen[-1][3]["max_tokens"] == 9000 and not desk.written.exists()


def test_where_no_answer_keeps_the_format_one_is_shown(serve, desk):
    server = serve(lambda text, body: completion("It is\nfine."))
    code, _ = desk(server.url)
    assert "no pair has CoTs of use: 8 without scores that can be read" in str(code)
    assert "'It is fine.'" in str(code) and desk.written.is_file()
    desk.pairs(60)
    desk.written.unlink()
    server.asked.clear()
    code, _ = desk(server.url, "--parallel", 1)  # not all are paid for
    assert "such as 'It is fine.'" in str(code) and 50 <= len(server.asked) < 55


def test_an_answer_is_kept_while_an_earlier_one_is_waited_for(serve, desk):
    def answer(text, body):
        while "0a" in text and desk.written.read_text().count("\n") < 1 + 7:
            time.sleep(0.01)
        return completion()

    assert desk(serve(answer).url, "--parallel", 2, "--timeout", 9, "--retries", 0)[0] == 0


def test_a_full_disk_ends_it_and_what_was_written_is_gone_on_behind(serve, desk):
    append = journal.Journal.append

    def cut_short(self, line):
        if desk.written.read_text().count("\n") == 4:
            append(self, line[:20])
            raise DataError("no space left")
        append(self, line)

    server = serve(lambda text, body: completion())
    desk.monkeypatch.setattr(journal.Journal, "append", cut_short)
    code, _ = desk(server.url, "--parallel", 1)
    assert "no space" in str(code) and not desk.out.exists()
    desk.monkeypatch.undo()
    desk.monkeypatch.setattr(annotate.Api, "question",
                             lambda self, videos, prompt: ([{"type": "text", "text": videos["<video>"]}], {}))
    assert desk(server.url)[0] == 0 and sum(text[0] == "/" for text in server.asked) == 8 - 3


def test_ctrl_c_ends_it_soon_and_keeps_what_was_answered(serve, desk):
    """The answer that is under way comes within the time that is left for it, the other does not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    desk.monkeypatch.setattr(asking, "GRACE", 0.6)
    over = threading.Event()

    def answer(text, body):
        if "2a" in text:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        elif "1b" in text:
            over.wait(20)
        return completion()

    server = serve(answer)
    started = time.monotonic()
    code, said = desk(server.url, "--parallel", 2)
    over.set()
    assert isinstance(code, KeyboardInterrupt) and time.monotonic() - started < 5
    assert "has 4 of 8 videos; the same command goes on" in said and len(server.asked) == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert desk(server.url, "--retries", 0)[0] == 0 and len(server.asked) == 5 + 4


# ------------------------------------------------------------------------------------------------------------
# Settings that are refused, and quotas

OPENAI = {"error": {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
                    "param": "max_tokens"}}
HEAT = {"error": {"message": "max_tokens is fine; temperature does not support 0.4", "param": "temperature"}}
STRICT = {"detail": [{"type": "extra_forbidden", "loc": ["body", "max_tokens"]}]}


@pytest.mark.parametrize("refusal", [OPENAI, STRICT])
def test_a_setting_that_is_refused_is_asked_for_otherwise_from_then_on(serve, desk, refusal):
    def answer(text, body):
        if "max_tokens" in body:
            return 422 if refusal is STRICT else 400, {}, refusal
        return (400, {}, HEAT) if "temperature" in body else completion()

    server = serve(answer)
    code, said = desk(server.url, "--parallel", 1, "--temperature", 0.4, "--max-new-tokens", 77)
    assert code == 0 and len(server.asked) == 8 + 2
    assert said.count("refuses max_tokens, temperature; asked with max_completion_tokens instead") == 1
    assert {key: value for key, value in server.seen[-1][3].items() if key != "messages"} == {
        "model": "m", "max_completion_tokens": 77}


def test_a_refusal_that_only_speaks_of_a_setting_changes_nothing(serve):
    server = serve(lambda text, body: (400, {}, "such a temperature is not to be shown"))
    one = Endpoint(server.url, "m")
    with pytest.raises(Refused):
        one.ask([{"type": "text", "text": "q"}])
    server.answer = lambda text, body: completion()
    one.ask([{"type": "text", "text": "q"}])
    assert set(server.seen[-1][3]) == {"model", "messages", "max_tokens", "temperature"}


def test_of_settings_that_a_refusal_names_the_one_that_it_means_is_changed(serve):
    server = serve(lambda text, body: (400, {}, HEAT) if "temperature" in body else completion())
    asks_once(Endpoint(server.url, "m"))
    assert set(server.seen[-1][3]) == {"model", "messages", "max_tokens"} and len(server.seen) == 2


def asks(one, count=1):
    threads = [threading.Thread(target=one.ask, args=([{"type": "text", "text": str(number)}],))
               for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_all_wait_while_there_is_no_room_and_attempts_do_not_count(serve):
    def answer(text, body):
        if len(server.asked) <= 2:
            return 429, {"Retry-After": "0.4"}, "later"
        return completion()

    server = serve(answer)
    one = Endpoint(server.url, "m", retries=0)
    asks(one, 2)
    first, *_, last = [when for when, *_ in server.seen]
    assert len(server.seen) == 4 and last - first >= 0.4
    server.seen.clear()
    one.room_at = time.monotonic() + 0.3
    asks(one, 2)
    assert min(when for when, *_ in server.seen) >= one.room_at


def test_no_room_for_too_long_ends_the_command(serve):
    server = serve(lambda text, body: (429, {"Retry-After": "7200"}, "come tomorrow"))
    with pytest.raises(DataError, match=r"no room within 3600 seconds: HTTP 429 .*come tomorrow"):
        asks_once(Endpoint(server.url, "m"))
    server.answer = lambda text, body: (429, {}, "later")
    with pytest.raises(DataError, match="no room within 0.5 seconds"):
        asks_once(Endpoint(server.url, "m", patience=0.5))


def asks_once(one):
    return one.ask([{"type": "text", "text": "q"}])


def test_a_pause_is_read_as_seconds_or_as_a_date():
    for seconds in (75, 3000):
        when = datetime.now(UTC) + timedelta(seconds=seconds)
        assert endpoint.retry_after(format_datetime(when, usegmt=True)) == pytest.approx(seconds, abs=2)
    assert endpoint.retry_after("75") == 75 and endpoint.retry_after("0.5") == 0.5
    for value in (None, "", "soon", "-3", "nan", "inf", "Mon, 01 Jan 2001 00:00:00 GMT", "Mon, 99"):
        assert endpoint.retry_after(value) == 0


def test_an_answer_that_trickles_is_cut_off_in_time(serve, monkeypatch):
    def slowly(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        for _ in range(100):
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.05)

    monkeypatch.setattr(Handler, "do_POST", slowly)
    started = time.monotonic()
    with pytest.raises(endpoint.Failed, match="timed out after 0.3 seconds"):
        asks_once(Endpoint(serve(None).url, "m", timeout=0.3, retries=0))
    assert time.monotonic() - started < 2


# ------------------------------------------------------------------------------------------------------------
# Secrets, and what the environment says


def test_the_key_is_nowhere(serve, desk, caplog):
    caplog.set_level("DEBUG")
    echo = json.dumps({"error": f"the key {KEY} is"}).replace("/", "\\/")
    server = serve(lambda text, body: completion(COT.replace("It", f"{KEY} It")) if "0" in text
                   else (400, {}, echo) if "1" in text else completion())
    desk.monkeypatch.setenv("MINE", KEY)
    url = server.url.replace("//", "//somebody:pa%23ssword@") + "?key=query-secret"
    code, said = desk(url, "--api-key-env", "MINE")
    assert code == 1 and {path for _, path, *_ in server.seen} == {"/v1/chat/completions?key=query-secret"}
    assert {key for *_, key, _ in server.seen} == {f"Bearer {KEY}"}
    server.answer = lambda text, body: (401, {}, f"{KEY} password pa#ssword query-secret somebody")
    code, more = desk(url, "--api-key-env", "MINE")
    assert "HTTP 401" in str(code)
    everything = said + more + str(code) + caplog.text + desk.out.read_text() + desk.written.read_text()
    for secret in (KEY, KEY.split("/")[1], "somebody", "pa%23ssword", "pa#ssword", "query-secret"):
        assert secret not in everything
    assert f'"api": "{server.url}"' in desk.written.read_text()
    assert KEY not in repr(annotate.Api(server.url, "m", None, KEY))


@pytest.mark.parametrize(("key", "address"), [("nothing", "//"), (None, "//camera:x@")])
def test_an_answer_with_a_secret_in_it_is_refused_and_not_changed(serve, key, address):
    server = serve(lambda text, body: completion("nothing, in camera"))
    with pytest.raises(endpoint.Refused, match="the answer has the key in it") as caught:
        asks_once(Endpoint(server.url.replace("//", address), "m", key))
    assert not isinstance(caught.value, endpoint.Failed) and len(server.asked) == 1
    assert asks_once(Endpoint(server.url, "m", "EMPTY"))["cot"] == "nothing, in camera"


def test_a_variable_that_is_not_there_is_named(serve, desk):
    server = serve(lambda text, body: completion())
    code, _ = desk(server.url, "--api-key-env", "NO_SUCH")
    assert "NO_SUCH" in str(code) and not server.asked
    code, _ = desk(server.url)  # the usual one may be missing
    assert not code


def test_name_and_password_of_an_address_are_sent(serve):
    server = serve(lambda text, body: completion())
    asks_once(Endpoint(server.url.replace("//", "//a:b@"), "m"))
    assert server.seen[0][2] == "Basic YTpi"


@pytest.mark.parametrize(("key", "message"), [
    ("sk-secret\n", "KEY: its character 10 is a line break"), ("sk\r\n-secret", "3 is a line break"),
    ("“sk-secret”", r"1 is U\+201C, which is not ASCII"), ("sk-sécret", r"U\+00E9"),
    ("sk secret", "a space")])
def test_a_key_that_no_header_holds_is_refused_before_it_is_sent(serve, desk, key, message):
    server = serve(lambda text, body: completion())
    desk.monkeypatch.setenv("KEY", key)
    code, _ = desk(server.url, "--api-key-env", "KEY")
    with pytest.raises(DataError, match=message):
        raise code
    assert "secret" not in str(code) and not server.asked


VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


@pytest.fixture
def bare(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return monkeypatch


@pytest.mark.parametrize(("variable", "value", "scheme", "message"), [
    ("HTTPS_PROXY", "socks5://u:password@127.0.0.1:1", "https", "socksio"),
    ("ALL_PROXY", "socks5h://127.0.0.1:1", "http", "socksio"),
    ("HTTP_PROXY", "ftp://u:password@127.0.0.1", "http", "not a proxy such as"),
    ("http_proxy", "http://127.0.0.1:99999999", "http", "not a proxy such as"),
    ("HTTPS_PROXY", "http://", "https", "not a proxy such as"),
    ("HTTPS_PROXY", "http://[::1", "https", "not a proxy such as"),
    ("SSL_CERT_FILE", "/nowhere/ca.pem", "https", "no certificates can be read"),
    ("SSL_CERT_FILE", __file__, "https", "no certificates can be read"),
    ("SSL_CERT_DIR", "/nowhere/certs", "https", "no certificates can be read")])
def test_an_environment_that_cannot_be_used_is_named(serve, bare, variable, value, scheme, message):
    bare.setenv(variable, value)
    with pytest.raises(DataError, match=f"^{variable}: .*{message}") as caught:
        Endpoint(f"{scheme}://host.invalid/v1", "m")
    assert "password" not in str(caught.value)
    server = serve(lambda text, body: completion())
    for host in ("127.0.0.1", "localhost"):  # a neighbour needs none of it
        assert asks_once(Endpoint(server.url.replace("127.0.0.1", host), "m"))["cot"] == COT


def test_a_proxy_is_used_and_named_where_it_is_the_trouble(serve, bare):
    bare.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with pytest.raises(endpoint.Failed, match=r"no answer: .*refused \(by the proxy of HTTP_PROXY\)"):
        asks_once(Endpoint("http://host.invalid/v1", "m", retries=0))
    proxy = serve(lambda text, body: completion())
    bare.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
    asks_once(Endpoint("http://host.invalid/v1", "m"))
    assert proxy.seen[0][1] == "http://host.invalid/v1/chat/completions"
    bare.setenv("NO_PROXY", "[::1,host.invalid")
    with pytest.raises(endpoint.Failed, match="no answer: ") as caught:
        asks_once(Endpoint("http://host.invalid/v1", "m", retries=0))
    assert "PROXY" not in str(caught.value)


@pytest.mark.parametrize("url", ["127.0.0.1/v1", "nonsense", "ftp://u:password@x", "http://x:99999999/v1",
                                 "http://u:password@/v1", "http://a..b/v1", "http://[::1/v1"])
def test_an_address_that_is_none_is_refused_by_name(url):
    with pytest.raises(DataError, match="^[^-].*: not an address such as https://HOST/v1") as caught:
        Endpoint(url, "m")
    assert "password" not in str(caught.value)
