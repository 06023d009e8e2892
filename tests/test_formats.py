"""The files that users already have, and the endpoints they annotate with."""

import base64
import csv
import http.server
import io
import json
import threading
from dataclasses import replace
from time import sleep

import numpy as np
import pytest
from conftest import ROOT, TOY_VIDEO
from launch import Started, run
from PIL import Image
from transformers import AutoTokenizer

from data import (
    DIMENSIONS,
    DataError,
    Pair,
    Processor,
    VideoSettings,
    check_instruction,
    make_instruction,
    parse_cot,
    read_video,
)
from support.formats import read_pairs
from tools import annotate
from tools import endpoint as endpoints
from tools import filter as filter_command
from tools.annotate import Api
from tools.filter import consistent
from tools.formats import write_pairs
from tools.shown import data_url
from tools.together import b_comes_first, check_question, read_both

SETTINGS = VideoSettings(min_pixels=4096, max_pixels=4096)
SCORES = {"subject": 2, "dynamics": 1, "camera": "N/A", "environment": 2, "style": 0}
ANSWER = "<answer>" + json.dumps({"dimensional_scores": SCORES, "overall_score": 3.4}) + "</answer>"


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.mp4").write_bytes(b"x")
    return tmp_path


def write_csv(path, columns, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


@pytest.mark.parametrize(("label", "expected"),
                         [(None, ["A", "tie"]), ("VQ", ["B", "A"]), ("Overall", ["tie", "B"])])
def test_videogen_reward_bench(folder, label, expected):
    path = write_csv(folder / "any.csv",
                     ["path_A", "path_B", "A_model", "B_model", "prompt", "VQ", "MQ", "TA", "Overall"],
                     ["a.mp4", "b.mp4", "gen3", "luma", "A cat, \"running\"", "B", "A", "A", "same"],
                     ["./b.mp4", "c.mp4", "luma", "kling", "A dog", "A", "A", "same", "B"])
    pairs = read_pairs(path, label)
    assert [pair.preference for pair in pairs] == expected
    assert (pairs[0].model_a, pairs[0].model_b, pairs[0].prompt) == ("gen3", "luma", 'A cat, "running"')


def test_videoalign_counts_invalid_and_missing_rows(folder):
    path = write_csv(folder / "train.csv", ["path_A", "path_B", "prompt", "VQ", "MQ", "TA"],
                     ["a.mp4", "b.mp4", "x", "A", "A", "invalid"], ["a.mp4", "no.mp4", "x", "A", "A", "B"],
                     ["a.mp4", "b.mp4", "x", "A", "A", "B"])
    pairs = read_pairs(path)
    assert [pair.preference for pair in pairs] == ["B"]
    assert [(row["row"], row["reason"]) for row in pairs.left_out] == [(2, "invalid"), (3, "missing")]
    assert "no.mp4" in pairs.summary()


@pytest.mark.parametrize("suffix", ["_video_path", "_video"])
def test_genai_bench(folder, suffix):
    columns = ["prompt", "left_model", "right_model", "vote_type", "left" + suffix, "right" + suffix]
    path = write_csv(folder / "v.csv", columns, *[["x", "m", "n", vote, "a.mp4", "b.mp4"] for vote in
                                                 ("leftvote", "rightvote", "tievote", "bothbad_vote")])
    assert [pair.preference for pair in read_pairs(path)] == ["A", "B", "tie", "tie"]


def test_the_release_of_descore(folder):
    one = write_csv(folder / "1.csv", ["videos", "problem", "prompt", "CoT_A", "CoT_B", "GSB"],
                    ['["a.mp4", "b.mp4"]', "Judge: x", "x", "<think>1", "<think>2", "same"],
                    ["['a.mp4', 'c.mp4']", "Judge: y", "y", "<think>1", "<think>2", "invalid"])
    (pair,) = read_pairs(one)
    assert (pair.preference, pair.cot_a, pair.prompt, pair.problem) == ("tie", "<think>1", "x", "Judge: x")
    answer = {"video_1_scores": {"object" if k == "subject" else k: v for k, v in SCORES.items()},
              "video_2_scores": SCORES, "gsb_result": "Video 2 is better"}
    two = write_csv(folder / "2.csv", ["videos", "problem", "answer"],
                    ['["a.mp4", "b.mp4"]', "Judge: x", f"<answer>{json.dumps(answer)}</answer>"],
                    ['["a.mp4", "b.mp4"]', "Judge: x",
                     f"<answer>{json.dumps(answer | {'gsb_result': 'Both'})}</answer>"],
                    ["['a.mp4', 'b.mp4']", "Judge: x", "Video 1 is better"])
    pairs = read_pairs(two, prompt="problem")
    assert [pair.preference for pair in pairs] == ["B", "tie", "A"]
    assert pairs[0].scores_a == pairs[0].scores_b == SCORES and pairs[0].prompt == "Judge: x"
    three = write_csv(folder / "3.csv", ["video_A", "video_B", "prompt", "answer"],
                      ["a.mp4", "b.mp4", "x", "A"], ["a.mp4", "b.mp4", "x", "Video 1 is better"],
                      ["a.mp4", "b.mp4", "x", '<answer>{"gsb_result": "B"}</answer>'])
    assert [pair.preference for pair in read_pairs(three)] == ["A", "A", "B"]


QUOTED = {name: f" {value} " for name, value in SCORES.items()}
JUDGED = json.dumps({"video_1_scores": SCORES, "video_2_scores": QUOTED, "gsb_result": "Video 2 is better."})


@pytest.mark.parametrize("answer", [
    JUDGED, "<answer>{}</answer>", "<answer>\n```json\n{}\n```\n</answer>", "<answer>```\n{}```</answer>",
    "<answer>``` JSON \n{}\n```  \n</answer>", "```json\n{}\n```", "<answer>So:\n```json\n{}\n```</answer>",
    "<think>then in <answer> …</think><answer>{}</answer>", "<think>x</think>\n<answer>{}"])
def test_an_answer_is_read_in_any_wrapping(folder, answer):
    path = write_csv(folder / "2.csv", ["videos", "prompt", "problem", "answer"],
                     ["['a.mp4', 'b.mp4']", "x", "Judge: x", answer.replace("{}", JUDGED)])
    (pair,) = read_pairs(path)
    assert (pair.preference, pair.scores_a, pair.scores_b) == ("B", SCORES, SCORES)


@pytest.mark.parametrize(("answer", "preference"), [
    ("<answer>A</answer>", "A"), ("video 1 is better", "A"), (" B\n", "B"), ("Video 1 and 2 tie", "tie"),
    ('{"gsb_result": "Same"}', "tie"), ('{"gsb_result": "neither"}', "tie"), ("<answer>tie</answer>", "tie")])
def test_labels_of_an_answer(folder, answer, preference):
    path = write_csv(folder / "2.csv", ["videos", "prompt", "answer"], ["['a.mp4', 'b.mp4']", "x", answer])
    assert [pair.preference for pair in read_pairs(path)] == [preference]


@pytest.mark.parametrize(("result", "found"), [
    ("video 1 is slightly better", None), ("Video A is better", None), ("video_2", None),
    ("A is better", None),
    ("Video 1 is much better than Video 2", None), ("1", None), ("the second wins", None),
    ("Video 2  is\nbetter.", "B"), ("Neither video is better", "tie"), ("No clear winner", "tie"),
    ("Video 1 is as good as the other, a draw", "tie"), ("both are good", "tie"),
    ("video 1 ~ video 2", "tie")])
def test_what_may_name_a_winner_is_no_tie(folder, result, found):
    answer = json.dumps({"gsb_result": result})
    path = write_csv(folder / "2.csv", ["videos", "prompt", "answer"], ["['a.mp4', 'b.mp4']", "x", answer])
    if found:
        assert [pair.preference for pair in read_pairs(path)] == [found]
        return
    with pytest.raises(DataError, match=r"2\.csv, row 2: the gsb_result '.*' seems to name a winner"):
        read_pairs(path)


def test_what_a_table_has_where_there_is_nothing_is_nothing(folder):
    row = {"prompt": "x", "video_a": "a.mp4", "video_b": "b.mp4", "preference": "A"}
    nulls = dict.fromkeys(SCORES)
    path = folder / "table.jsonl"
    path.write_text("".join(json.dumps(row | more) + "\n" for more in (
        {"cot_a": "", "cot_b": " \n", "scores_a": nulls, "scores_b": nulls},
        {"cot_a": " <think>", "scores_a": nulls | {"subject": 2}})))
    nothing, something = read_pairs(path)
    assert nothing.said("cot") == nothing.said("scores") == [None, None]
    assert something.cot_a == " <think>"
    assert something.scores_a == dict.fromkeys(SCORES, "N/A") | {"subject": 2}


def test_a_problem_never_stands_inside_another_instruction(folder):
    columns, row = ["videos", "problem", "answer"], ["['a.mp4', 'b.mp4']", "Judge: x", "A"]
    path = write_csv(folder / "2.csv", columns, row)
    with pytest.raises(DataError, match=r"2\.csv, row 2: no prompt, and its problem is a whole instruction"):
        read_pairs(path)
    assert read_pairs(path, prompt="problem")[0].prompt == "Judge: x"
    path = write_csv(folder / "2.csv", ["videos", "prompt", "answer"], row)
    assert read_pairs(path)[0].prompt == "Judge: x"
    with pytest.raises(DataError, match=r"2\.csv, row 2: no problem to be the instruction"):
        read_pairs(path, prompt="problem")
    both = write_csv(folder / "2.csv", ["prompt", *columns], ["x", *row])
    assert [read_pairs(both, prompt=name)[0].prompt for name in ("prompt", "problem")] == ["x", "Judge: x"]


@pytest.mark.parametrize(("columns", "row", "message"), [
    (["path_A", "path_B", "prompt", "TA"], ["a.mp4", "b.mp4", "x", "C"], r"row 2: the label is 'C'"),
    (["path_A", "path_B", "prompt", "VQ"], ["a.mp4", "b.mp4", "x", "A"], r"no label column TA or Overall"),
    (["path_A", "path_B", "prompt", "TA"], ["a.mp4", "b.mp4", "", "A"], r"row 2: 'prompt' is missing"),
    (["path_A", "path_B", "prompt", "TA"], ["a.mp4", "b.mp4"], r"row 2: not 4 columns"),
    (["videos", "problem", "prompt", "CoT_A", "CoT_B", "GSB"], ["a.mp4", "p", "x", "", "", "A"],
     r"row 2: videos is not"),
    (["videos", "prompt", "answer"], ["['a.mp4','b.mp4']", "p", "<answer>{}</answer>"],
     r"row 2: the answer has no"),
    (["videos", "prompt", "answer"], ["['a.mp4','b.mp4']", "p", '{"gsb_result": null}'],
     r"row 2: the answer has no gsb_result .*not a text"),
    (["videos", "prompt", "answer"], ["['a.mp4','b.mp4']", "p", "both"], r"row 2: the answer has no"),
    (["videos", "prompt", "answer"], ["['a.mp4','b.mp4']", "p", json.dumps(
        {"gsb_result": "A", "video_1_scores": {"subject": "3"}})], r"row 2: scores_a is not"),
    (["videos", "prompt", "answer"], ["['a.mp4','b.mp4']", "p", '{"gsb_result": "A"} {"gsb_result": "B"}'],
     r"row 2: the answer has no gsb_result that can be read"),
    (["left_model", "right_model", "vote_type", "prompt"], ["m", "n", "leftvote", "x"],
     r"without left_video"),
    (["x", "y"], ["1", "2"], r"none of the pair formats has these columns: x, y")])
def test_what_cannot_be_understood_is_named(folder, columns, row, message):
    with pytest.raises(DataError, match=message):
        read_pairs(write_csv(folder / "bad.csv", columns, row))


def test_other_dimensions_are_read_where_they_are_asked_for(folder):
    record = {"prompt": "x", "video_a": "a.mp4", "video_b": "b.mp4", "preference": "A",
              "scores_a": {"faces": 2, "hands": "N/A"}}
    (folder / "own.jsonl").write_text(json.dumps(record))
    (pair,) = read_pairs(folder / "own.jsonl", dimensions={"faces": 2, "hands": 1})
    assert pair.scores_a == record["scores_a"]
    with pytest.raises(DataError, match="row 1: scores_a is not"):
        read_pairs(folder / "own.jsonl")


def test_the_real_example_of_videoalign():
    path = ROOT.parent / "shared/videos/videoalign_example.csv"
    if not path.is_file():
        pytest.skip("no shared videos here")
    with pytest.raises(DataError, match=r"12 left out, missing: row 2 .*example_1_B\.mp4"):
        read_pairs(path, root=ROOT.parent / "shared")


def test_convert_and_check(world_dir, folder):
    rows = [[pair.video_a, pair.video_b, pair.prompt, "same" if pair.human == 0 else pair.preference]
            for pair in read_pairs(world_dir / "test_id.jsonl")]
    path = write_csv(folder / "x.csv", ["path_A", "path_B", "prompt", "Overall"], *rows)
    run("-m", "tools.convert", path, folder / "x.jsonl")
    assert [(p.preference, p.prompt) for p in read_pairs(folder / "x.jsonl")] == [
        (p.preference, p.prompt) for p in read_pairs(world_dir / "test_id.jsonl")]
    good = run("-m", "tools.check", folder / "x.jsonl", *TOY_VIDEO)
    assert "8 read, 0 broken" in good.stdout and "video tokens a sample: 16 to 16" in good.stdout
    processor = Processor(AutoTokenizer.from_pretrained(ROOT / "toy/backbone"), SETTINGS,
                          make_instruction(DIMENSIONS), DIMENSIONS)
    sizes = [len(processor(*key).input_ids) for pair in read_pairs(folder / "x.jsonl")
             for key in pair.videos()]
    assert f"\ntokens a sample: {min(sizes)} to {max(sizes)}, median" in good.stdout
    rows.append([str(folder / "a.mp4"), rows[0][1], "x", "A"])  # not a video
    write_csv(folder / "x.csv", ["path_A", "path_B", "prompt", "Overall"], *rows)
    bad = run("-m", "tools.check", folder / "x.csv", *TOY_VIDEO, check=False)
    assert bad.returncode == 1 and "1 broken" in bad.stdout and "a.mp4: not a video" in bad.stdout


# ------------------------------------------------------------------------------------------------------------
# An endpoint that answers slowly, fails, and sends nonsense


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Does with each request what `plan` says next, else answers with a CoT that repeats the prompt."""

    plan, seen, lock, under_way, most = [], [], threading.Lock(), 0, 0

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            cls = type(self)
            cls.seen.append((body, self.headers.get("Authorization")))
            cls.under_way += 1
            cls.most = max(cls.most, cls.under_way)
            action = cls.plan.pop(0) if cls.plan else "ok"
        sleep({"slow": 1.5}.get(action, 0.05))
        answer = self.reply(body["messages"][0]["content"])
        content = json.dumps({"choices": [{"message": {"content": answer}}]})
        status, content = {"429": (429, ""), "500": (500, "oh"), "401": (401, "no such key"),
                           "nonsense": (200, "<html>"), "odd": (200, '{"choices": []}'),
                           "empty": (200, '{"choices": [{"message": {"content": ""}}]}'),
                           }.get(action, (200, content))
        try:
            if action == "cut":
                self.connection.close()
            else:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(content.encode())
        except OSError:
            pass
        with self.lock:
            type(self).under_way -= 1

    @staticmethod
    def reply(parts):
        prompt = parts[-1]["text"].split("prompt:\n")[1].split("\n")[0]
        return f"<think>{prompt}</think>{ANSWER}"

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    pause = endpoints.Endpoint.pause  # between attempts
    monkeypatch.setattr(endpoints.Endpoint, "pause", lambda self, seconds: pause(self, seconds / 50))
    handler = type("Fresh", (Endpoint,), {"plan": [], "seen": [], "under_way": 0, "most": 0})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield handler
    server.shutdown()
    server.server_close()


def make_api(endpoint, **options):
    return Api(endpoint.url, "judge-1", SETTINGS,
               **{"timeout": 0.8, "parallel": 3} | options)


def make_keys(world_dir, count=8):
    pairs = read_pairs(world_dir / "train.jsonl")
    return [key for pair in pairs for key in pair.videos()][:count]


def test_the_api_is_asked_with_frames_and_answers_are_those_of_their_keys(endpoint, world_dir):
    endpoint.plan[:] = ["slow", "429", "nonsense", "odd", "500", "cut", "ok", "ok"]
    keys = make_keys(world_dir)
    found = {(record["video"], record["prompt"]): record["cot"]
             for record in make_api(endpoint, key="secret")(keys, done={})}
    assert sorted(found) == sorted(keys)
    assert all(cot.startswith(f"<think>{prompt}</think>") for (_, prompt), cot in found.items())
    body, key = endpoint.seen[0]
    assert key == "Bearer secret" and body["model"] == "judge-1"
    assert len(endpoint.seen) == 8 + 6  # each of the six troubles is asked again, once
    assert endpoint.most <= 3 + 1  # three at a time, and the server may still hold the one that timed out


def test_the_images_are_the_sampled_frames(endpoint, world_dir):
    ((video, prompt),) = keys = make_keys(world_dir, 1)
    list(make_api(endpoint)(keys, done={}))
    ((body, _),) = endpoint.seen
    parts = body["messages"][0]["content"]
    frames, seconds = read_video(video, SETTINGS)
    assert [part["text"] for part in parts[:-1:2]] == [f"<{second:.1f} seconds>" for second in seconds]
    for part, frame in zip(parts[1::2], frames, strict=True):
        header, _, encoded = part["image_url"]["url"].partition(",")
        image = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert header == "data:image/png;base64" and (image.format, image.mode) == ("PNG", "RGB")
        assert np.array_equal(np.asarray(image), frame.permute(1, 2, 0))
    assert prompt in parts[-1]["text"]


def test_the_api_is_not_asked_again(endpoint, world_dir):
    keys = make_keys(world_dir, 4)
    (record,) = make_api(endpoint)(keys, done=dict.fromkeys(keys[:3], ""))
    assert (record["video"], record["prompt"]) == keys[3] and len(endpoint.seen) == 1


def test_of_a_video_that_cannot_be_read_the_api_is_not_asked(endpoint, world_dir, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 100)
    keys = [*make_keys(world_dir, 1), (str(tmp_path / "broken.mp4"), "p")]
    bad, good = sorted(make_api(endpoint)(keys, done={}), key=lambda record: "cot" in record)
    assert "cot" in good and "broken.mp4: not a video" in bad["error"] and len(endpoint.seen) == 1


def test_no_key_is_sent_but_the_one_that_was_named(endpoint, world_dir, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "not for others")
    list(make_api(endpoint)(make_keys(world_dir, 1), done={}))
    assert [key for _, key in endpoint.seen] == [None]


@pytest.mark.parametrize(("plan", "requests", "message"), [
    ("500", 3, "gave up after 3 attempts: HTTP 500"),
    ("cut", 3, "gave up after 3 attempts: no answer: "),
    ("nonsense", 3, "gave up after 3 attempts: an answer that is no chat completion"),
    ("odd", 3, "gave up after 3 attempts: an answer that is no chat completion"),
    ("empty", 1, "refused: an empty answer")])
def test_the_api_gives_up_on_a_video_with_a_clear_error(endpoint, world_dir, plan, requests, message):
    endpoint.plan[:] = [plan] * 9
    ((video, _),) = keys = make_keys(world_dir, 1)
    (record,) = make_api(endpoint, retries=2, parallel=1)(keys, done={})
    assert record["error"].startswith(f"{video}: {endpoint.url}: {message}") and record["refused"]
    assert "\n" not in record["error"] and len(endpoint.seen) == requests


def test_the_api_gives_up_at_once_where_no_question_helps(endpoint, world_dir):
    endpoint.plan[:] = ["401"] * 9
    with pytest.raises(DataError, match=f"^{endpoint.url}: HTTP 401 Unauthorized: no such key$"):
        list(make_api(endpoint, retries=2, parallel=1)(make_keys(world_dir, 1), done={}))
    assert len(endpoint.seen) == 1


def test_an_endpoint_needs_the_packages_and_says_which(monkeypatch):
    for module, name in ((annotate, "Image"), (endpoints, "httpx2")):
        monkeypatch.setattr(module, name, None)
        with pytest.raises(DataError, match="pip install -r tools/requirements.txt"):
            Api("http://127.0.0.1/v1", "judge-1", SETTINGS)
        monkeypatch.undo()


def test_annotate_by_api_survives_a_failure_in_the_middle(endpoint, world_dir, tmp_path):
    command = ["-m", "tools.annotate", world_dir / "train.jsonl", tmp_path / "out.jsonl", "--api",
               endpoint.url, "--api-model", "judge-1",
               "--scores", "--parallel", 1, "--retries", 0, *TOY_VIDEO]
    endpoint.plan[:] = ["ok"] * 5 + ["401"]
    failed = run(*command, check=False)
    assert failed.returncode == 1 and "HTTP 401" in failed.stderr and "Traceback" not in failed.stderr
    asked = len(endpoint.seen)
    done = run(*command)
    assert "going on after 5 of 24 videos" in done.stderr
    assert len(endpoint.seen) - asked == 24 - 5
    pairs = read_pairs(tmp_path / "out.jsonl")
    assert len(pairs) == 12 and all(p.scores_a == SCORES and p.prompt in p.cot_a for p in pairs)


def test_the_api_is_asked_with_an_instruction_of_ones_own(endpoint, world_dir):
    keys = make_keys(world_dir, 1)
    mine = "Look:\n<video>\nIt was made from this prompt:\n<prompt>\nSay what you think of <prompt>."
    list(make_api(endpoint, instruction=mine)(keys, done={}))
    first, *_, last = endpoint.seen[0][0]["messages"][0]["content"]
    assert first["text"] == "Look:\n" and last["text"].count(keys[0][1]) == 2
    assert last["text"].endswith(f"Say what you think of {keys[0][1]}.")


# ------------------------------------------------------------------------------------------------------------
# Both videos of a pair in one question


def scores_of(number):
    """Sub-scores and an overall score that no other video of a few dozen has."""
    values = [number % 3, number // 3 % 3, "N/A" if number // 9 % 2 else 2, number // 18 % 3, 0]
    return dict(zip(DIMENSIONS, values)), 1 + number / 10


class Watcher:
    """Answers about both videos of a question by what it is shown, not by where it is shown."""

    def __init__(self, pairs):
        self.numbers, self.shown = {}, []
        for pair in pairs:
            for video in (pair.video_a, pair.video_b):
                pictures = tuple(data_url(frame) for frame in read_video(video, SETTINGS)[0])
                self.numbers[pictures] = self.numbers[video] = len(self.numbers) // 2

    def __call__(self, parts):
        videos, answer = [], {}
        for part in parts:
            if part["type"] == "image_url":
                videos[-1].append(part["image_url"]["url"])
            elif part["text"].endswith(("Video 1:\n", "Video 2:\n")):
                videos.append([])
        self.shown.append([self.numbers[tuple(pictures)] for pictures in videos])
        for place, number in enumerate(self.shown[-1], 1):
            answer[f"video_{place}_scores"], answer[f"video_{place}_overall"] = scores_of(number)
        return f"<think>…</think><answer>{json.dumps(answer)}</answer>"


def test_together_an_answer_is_never_written_to_the_other_video(
        endpoint, world_dir, tmp_path, monkeypatch, capsys):
    pairs = read_pairs(world_dir / "train_cots.jsonl")
    endpoint.reply = watcher = Watcher(pairs)
    out = tmp_path / "out.jsonl"
    command = ["-m", "tools.annotate", world_dir / "train_cots.jsonl", out, "--scores", "--together",
               "--api", endpoint.url, "--api-model", "judge-1", "--parallel", 1, "--retries", 0, *TOY_VIDEO]
    endpoint.plan[:] = ["ok"] * 5 + ["401"]
    failed = run(*command, check=False)
    assert failed.returncode == 1 and "HTTP 401" in failed.stderr and not out.exists()
    assert (tmp_path / "out.jsonl.cots").read_text().count("\n") == 1 + 5  # a record for each pair
    asked = len(endpoint.seen)
    monkeypatch.setattr("sys.argv", list(map(str, command[1:])))
    with pytest.raises(SystemExit, match="0"):
        annotate.main()
    assert "going on after 5 of 12 pairs" in capsys.readouterr().err
    assert len(endpoint.seen) - asked == 12 - 5
    annotated = read_pairs(out)
    orders = {"A": 0, "B": 0}
    for pair, before in zip(annotated, pairs, strict=True):
        a, b = watcher.numbers[before.video_a], watcher.numbers[before.video_b]
        assert (pair.scores_a, pair.overall_a) == scores_of(a)
        assert (pair.scores_b, pair.overall_b) == scores_of(b)
        assert pair.cot_a is pair.cot_b is None  # what stood there was about one video
        orders["A" if [a, b] in watcher.shown else "B"] += 1
        assert ([a, b] in watcher.shown) != ([b, a] in watcher.shown)
    assert min(orders.values()) > 1
    monkeypatch.setattr("sys.argv", ["filter", str(out), str(tmp_path / "kept.jsonl")])
    filter_command.main()
    kept = [pair.prompt for pair in read_pairs(tmp_path / "kept.jsonl")]
    signs = [(p, (p.overall_a > p.overall_b) - (p.overall_a < p.overall_b)) for p in annotated]
    assert kept == [pair.prompt for pair, sign in signs if sign == pair.human] and 0 < len(kept) < 12


def test_which_video_comes_first_is_a_coin_for_each_pair():
    names = [(f"{i}_a.mp4", f"{i}_b.mp4", f"prompt {i % 7}") for i in range(1000)]
    draws = {seed: [b_comes_first(seed, *name) for name in names] for seed in (0, 1)}
    for drawn in draws.values():
        assert 400 < sum(drawn) < 600  # six standard deviations
    assert 400 < sum(a != b for a, b in zip(draws[0], draws[1])) < 600
    assert draws[0] == [b_comes_first(0, f"/x/{a}", f"/y/{b}", p) for a, b, p in names]


@pytest.mark.parametrize(("answer", "overall"), [
    ({}, (3.0, 4.0)), ({"video_1_overall": "3.0", "Video 2 overall": None}, (None, None)),
    ({"video_2_overall": 7}, None), ({"video_2_scores": SCORES | {"style": 3}}, None)])
def test_an_answer_about_both_is_read_or_not(answer, overall):
    whole = {"video_1_scores": SCORES, "video_2_scores": SCORES | {"style": "2"}, "video_1_overall": 3,
             "video_2_overall": 4.0}
    if "Video 2 overall" in answer:
        del whole["video_2_overall"]
    found = read_both(f"It's so: ```JSON\n{json.dumps(whole | answer)[:-1]},}}```")
    assert (found and tuple(one["overall_score"] for one in found)) == overall
    if found:
        assert [one["dimensional_scores"] for one in found] == [SCORES, SCORES | {"style": 2}]
        assert read_both(json.dumps({"video_1_scores": SCORES})) is None


def test_together_a_pair_with_an_unreadable_video_is_listed(
        endpoint, world_dir, tmp_path, monkeypatch, capsys):
    pairs = read_pairs(world_dir / "train.jsonl")[:3]
    endpoint.reply = watcher = Watcher(pairs)
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 100)
    broken = str(tmp_path / "broken.mp4")
    out = tmp_path / "out.jsonl"
    command = ["annotate", str(tmp_path / "in.jsonl"), str(out), "--scores", "--together", "--api",
               endpoint.url, "--api-model", "judge-1", *TOY_VIDEO]
    monkeypatch.setattr("sys.argv", command)
    changed = [pairs[0], replace(pairs[1], video_b=broken), pairs[2]]
    write_pairs(tmp_path / "in.jsonl", changed)
    with pytest.raises(SystemExit) as ended:
        annotate.main()
    said = capsys.readouterr()
    assert ended.value.code == 1 and f"left out: {broken}: not a video" in said.err
    assert "2 pairs, 2 pairs annotated; 1 left out, a video cannot be read" in said.out
    assert len(watcher.shown) == 2 and len(read_pairs(out)) == 2  # of the third nothing is asked
    write_pairs(tmp_path / "in.jsonl", changed[1:2])
    out.with_name("out.jsonl.cots").unlink()
    with pytest.raises(DataError, match="no pair has two videos that can be read .*broken.mp4: not a video"):
        annotate.main()


@pytest.mark.parametrize(("extra", "message"), [
    (["--model", "toy/backbone", "--scores"], "--together is for --api alone: a model of ours"),
    (["--api", "u", "--api-model", "m"], "--together needs --scores"),
    (["--api", "u", "--api-model", "m", "--scores", "--instruction", "presets/detailed.txt"],
     "the instruction of --together must hold <video_1> and <video_2> exactly once")])
def test_together_is_refused_by_name(extra, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["annotate", "in.jsonl", "out.jsonl", "--together", *extra])
    with pytest.raises(DataError, match=message):
        annotate.main()


def band(scores):
    """The overall scores that the rubric allows."""
    primary = [2 if scores[name] == "N/A" else scores[name] for name in DIMENSIONS if DIMENSIONS[name] > 1]
    if 0 in primary:
        return (1, 2) if set(primary) == {0} else (2, 3)
    return (3, 4) if 1 in primary else (4, 5.01)


def test_the_longer_instructions_ask_for_what_is_read():
    for name in ("detailed", "together"):
        text = (ROOT / f"presets/{name}.txt").read_text()
        for dimension in DIMENSIONS:
            assert f"\n- {dimension}: " in text
        for grade in ("5: ", "4 to 4.99: ", "3 to 3.99: ", "2 to 2.99: ", "1 to 1.99: "):
            assert f"\n- {grade}" in text
        assert "inside <think> </think>" in text and "inside <answer> </answer>" in text
        example = text.rpartition("form, and nothing else:\n")[2]
        if name == "detailed":
            check_instruction(text)
            read = [parse_cot(f"<answer>{example}</answer>")]
        else:
            check_question(text)
            read = read_both(example)
        for one in read:
            low, high = band(one["dimensional_scores"])
            assert low <= one["overall_score"] < high


# ------------------------------------------------------------------------------------------------------------
# Annotation by a model here, and the filter


@pytest.mark.slow
def test_annotate_writes_one_cot_a_video_and_goes_on_where_it_was_killed(world_dir, tmp_path):
    pairs = world_dir / "train.jsonl"
    command = ["-m", "tools.annotate", pairs, tmp_path / "whole.jsonl", "--model", "toy/backbone",
               "--max-new-tokens", 160, "--max-tokens", 1200]  # --think-tokens' old name
    run(*command)
    whole = read_pairs(tmp_path / "whole.jsonl")
    assert all(pair.cot_a and pair.cot_b for pair in whole)
    command[3] = tmp_path / "cut.jsonl"
    process = Started(*command)
    written = tmp_path / "cut.jsonl.cots"
    while process.running() and (not written.is_file() or written.read_bytes().count(b"\n") < 5):
        sleep(0.01)
    process.kill()
    process.wait()
    assert written.is_file() and not (tmp_path / "cut.jsonl").is_file()
    assert "going on after" in run(*command).stderr
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not written.is_file()


def repeat(keys, done):
    """Stands for a model: a CoT with whatever Unicode calls the end of a line."""
    for video, prompt in keys:
        if (video, prompt) not in done:
            cot = f"<think>\u2028\x85\r\n{prompt}</think>"
            yield {"video": video, "prompt": prompt, "cot": cot, "reward": 1}


@pytest.mark.parametrize("cut", ["", '{"video": "', '{"video": "caf\u00e9'])
def test_annotate_goes_on_behind_the_last_whole_line(world_dir, tmp_path, cut, capsys):
    keys = list(dict.fromkeys(make_keys(world_dir, 24)))
    records = [record | {"reward": None} for record in repeat(keys[:3], {})]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in [{"made_by": {}}, *records]]
    (tmp_path / "out.jsonl.cots").write_bytes("".join([*lines, cut]).encode()[: None if cut == "" else -1])
    asked = []

    def write(keys, done):
        for record in repeat(keys, done):
            if len(asked) == 2:
                asked.append("cut off")
                raise DataError("cut off")
            asked.append((record["video"], record["prompt"]))
            yield record

    with pytest.raises(DataError, match="cut off"):
        annotate.annotate(world_dir / "train.jsonl", tmp_path / "out.jsonl", write, {})
    annotate.annotate(world_dir / "train.jsonl", tmp_path / "out.jsonl", write, {})
    assert asked == [*keys[3:5], "cut off", *keys[5:]]
    assert "going on after 5 of 24 videos" in capsys.readouterr().err
    for pair in read_pairs(tmp_path / "out.jsonl"):
        assert pair.cot_a == pair.cot_b == f"<think>\u2028\x85\r\n{pair.prompt}</think>"


@pytest.mark.parametrize(("content", "message"), [
    ('{"made_by": {}}\n{"video": "v.mp4", "prompt": "x", "cot": "y"}\n', "holds judgements of other videos"),
    ('{"made_by": {}}\n{"video": "v.mp4"}\n', "row 2: not of this command"),
    ('{"made_by": {"seed": 1, "fps": 2.0}}\n', "made otherwise than this command would, by seed, fps;"),
    ('{"video": "v.mp4", "prompt": "x", "cot": "y"}\n', "row 1: not of this command"),
    ("\xff\n", "row 1: not of this command"), ("[]\n", "row 1: not of this command"),
    ('{"made_by": [1]}\n', "row 1: not of this command"), ("7\n", "row 1: not of this command"),
    ("my notes", "row 1: not of this command")])
def test_annotate_leaves_the_file_of_somebody_else_alone(world_dir, tmp_path, content, message):
    written = tmp_path / "out.jsonl.cots"
    written.write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=rf"out\.jsonl\.cots.*{message}"):
        annotate.annotate(world_dir / "train.jsonl", tmp_path / "out.jsonl", repeat, {})
    assert written.read_text(encoding="latin-1") == content


def cot(overall=None, **scores):
    scores = {"subject": 1, "dynamics": 1, "camera": 1, "environment": 1, "style": 1} | scores
    answer = {"dimensional_scores": scores} | ({"overall_score": overall} if overall else {})
    return f"<answer>{json.dumps(answer)}</answer>"


@pytest.mark.parametrize(("label", "a", "b", "verdict"), [
    ("A", cot(4.0), cot(3.0), "kept"), ("B", cot(4.0), cot(3.0), "the annotations imply the other"),
    ("tie", cot(4.0), cot(4.0), "kept"), ("tie", cot(4.0), cot(3.0), "the label is a tie"),
    ("A", cot(4.0), cot(4.0), "the annotations imply a tie"),
    ("A", cot(4.0), "nothing", "an annotation that says nothing"), ("A", cot(4.0), None, "no CoT"),
    ("A", cot(subject=2, style=0), cot(), "kept"),  # a primary dimension weighs more than a secondary one
    ("B", cot(environment=2, dynamics=0), cot(), "kept")])
def test_the_filter_keeps_what_is_consistent(label, a, b, verdict):
    assert consistent(Pair("p", "a", "b", label, cot_a=a, cot_b=b)) == verdict


@pytest.mark.parametrize(("label", "b", "verdict"), [
    ("A", {"style": 0}, "kept"), ("B", {"style": 0}, "the annotations imply the other"),
    ("tie", {}, "kept"), ("A", {}, "the annotations imply a tie")])
def test_the_filter_goes_by_reference_scores_where_there_are_no_cots(label, b, verdict):
    scores = dict.fromkeys(DIMENSIONS, 2)
    pair = Pair("p", "a", "b", label, scores_a=scores, scores_b=scores | b)
    assert consistent(pair) == verdict


def test_the_filter_goes_by_the_overall_scores_of_whoever_saw_both():
    pair = Pair("p", "a", "b", "A", cot_a=cot(2.0), cot_b=cot(3.0), overall_a=3.0, overall_b=2.9)
    assert consistent(pair) == "kept"
    assert consistent(replace(pair, overall_b=3.0)) == "the annotations imply a tie"
    assert consistent(replace(pair, overall_b=None)) == "the annotations imply the other"
    turned = replace(pair, preference="B").winner_first()
    assert (turned.overall_a, turned.overall_b) == (2.9, 3.0)


def test_filter_says_what_it_kept(world_dir, tmp_path):
    out = run("-m", "tools.filter", world_dir / "train_cots.jsonl", tmp_path / "kept.jsonl").stdout
    kept = read_pairs(tmp_path / "kept.jsonl")
    assert f"{len(kept)} kept" in out and 6 <= len(kept) <= 12  # true CoTs, noisy labels


@pytest.mark.parametrize(("command", "message"), [
    (["tools.filter", "missing.jsonl", "out.jsonl"], "missing.jsonl: no such file"),
    (["tools.convert", "missing.csv", "out.jsonl"], "missing.csv: no such file"),
    (["tools.check", "missing.csv"], "missing.csv: no such file"),
    (["tools.check", "missing.csv", "--model", "toy"], "toy: no tokenizer"),
    (["tools.annotate", "missing.csv", "out.jsonl", "--api", "http://127.0.0.1/v1", "--api-model", "x"],
     "missing.csv: no such file"),
    (["tools.annotate", "missing.csv", "out.jsonl"], "annotate needs --model, or --api and --api-model")])
def test_errors_are_one_clear_line(command, message):
    done = run("-m", *command, check=False)
    assert done.returncode == 1 and f"error: {message}" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["annotate", "filter", "convert", "check"])
def test_data_says_where_its_commands_have_gone(command):
    done = run("data.py", command, "pairs.csv", "out.jsonl", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert f"is now python -m tools.{command}" in done.stderr and "Traceback" not in done.stderr


def test_overall_scores_of_an_earlier_annotation_do_not_outlive_it(world_dir, tmp_path):
    """The filter goes by them first."""
    rows = []
    for line in (world_dir / "train.jsonl").read_text().splitlines()[:2]:
        row = json.loads(line) | {"overall_a": 1.5, "overall_b": 4.5}
        rows.append(row | {key: str(world_dir / row[key]) for key in ("video_a", "video_b")})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(keys, done):
        for video, prompt in keys:
            yield {"video": video, "prompt": prompt, "cot": "so it is"}

    annotate.annotate(tmp_path / "pairs.jsonl", tmp_path / "out.jsonl", write, {})
    for pair in read_pairs(tmp_path / "out.jsonl"):
        assert pair.cot_a == "so it is" and pair.overall_a is None and pair.overall_b is None
