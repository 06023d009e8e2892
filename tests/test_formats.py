"""The files that users already have, and the endpoints they annotate with."""

import base64
import csv
import http.server
import json
import threading
import time

import pytest
import torch
from conftest import ROOT, TOY_VIDEO
from launch import run
from transformers import AutoTokenizer

from data import Api, DataError, Processor, VideoSettings, png, read_pairs

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
    assert [(row["row"], row["reason"]) for row in pairs.left_out] == [(1, "invalid"), (2, "missing")]
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
                     f"<answer>{json.dumps(answer | {'gsb_result': 'Both'})}</answer>"])
    pairs = read_pairs(two)
    assert [pair.preference for pair in pairs] == ["B", "tie"]
    assert pairs[0].scores_a == pairs[0].scores_b == SCORES and pairs[0].prompt == "Judge: x"
    three = write_csv(folder / "3.csv", ["video_A", "video_B", "prompt", "answer"],
                      ["a.mp4", "b.mp4", "x", "A"], ["a.mp4", "b.mp4", "x", "Video 1 is better"],
                      ["a.mp4", "b.mp4", "x", '<answer>{"gsb_result": "B"}</answer>'])
    assert [pair.preference for pair in read_pairs(three)] == ["A", "A", "B"]


@pytest.mark.parametrize(("columns", "row", "message"), [
    (["path_A", "path_B", "prompt", "TA"], ["a.mp4", "b.mp4", "x", "C"], r"row 1: the label is 'C'"),
    (["path_A", "path_B", "prompt", "VQ"], ["a.mp4", "b.mp4", "x", "A"], r"no label column TA or Overall"),
    (["path_A", "path_B", "prompt", "TA"], ["a.mp4", "b.mp4", "", "A"], r"row 1: the prompt is empty"),
    (["path_A", "path_B", "prompt", "TA"], ["a.mp4", "b.mp4"], r"row 1: not 4 columns"),
    (["videos", "problem", "prompt", "CoT_A", "CoT_B", "GSB"], ["a.mp4", "p", "x", "", "", "A"],
     r"row 1: videos is not"),
    (["videos", "problem", "answer"], ["['a.mp4','b.mp4']", "p", "<answer>{}</answer>"],
     r"row 1: the answer has no"),
    (["x", "y"], ["1", "2"], r"none of the pair formats has these columns: x, y")])
def test_what_cannot_be_understood_is_named(folder, columns, row, message):
    with pytest.raises(DataError, match=message):
        read_pairs(write_csv(folder / "bad.csv", columns, row))


def test_the_real_example_of_videoalign():
    path = ROOT.parent / "shared/videos/videoalign_example.csv"
    if not path.is_file():
        pytest.skip("no shared videos here")
    with pytest.raises(DataError, match=r"12 left out, missing: row 1 .*example_1_B\.mp4"):
        read_pairs(path, root=ROOT.parent / "shared")


def test_convert_and_check(world_dir, folder):
    rows = [[pair.video_a, pair.video_b, pair.prompt, "same" if pair.human == 0 else pair.preference]
            for pair in read_pairs(world_dir / "test_id.jsonl")]
    path = write_csv(folder / "x.csv", ["path_A", "path_B", "prompt", "Overall"], *rows)
    run("data.py", "convert", path, folder / "x.jsonl")
    assert [(p.preference, p.prompt) for p in read_pairs(folder / "x.jsonl")] == [
        (p.preference, p.prompt) for p in read_pairs(world_dir / "test_id.jsonl")]
    good = run("data.py", "check", folder / "x.jsonl", *TOY_VIDEO)
    assert "8 read, 0 broken" in good.stdout and "video tokens a sample: 16 to 16" in good.stdout
    processor = Processor(AutoTokenizer.from_pretrained(ROOT / "toy/backbone"), SETTINGS)
    sizes = [len(processor(*key).input_ids) for pair in read_pairs(folder / "x.jsonl")
             for key in pair.videos()]
    assert f"\ntokens a sample: {min(sizes)} to {max(sizes)}, median" in good.stdout
    rows.append([str(folder / "a.mp4"), rows[0][1], "x", "A"])  # not a video
    write_csv(folder / "x.csv", ["path_A", "path_B", "prompt", "Overall"], *rows)
    bad = run("data.py", "check", folder / "x.csv", *TOY_VIDEO, check=False)
    assert bad.returncode == 1 and "1 broken" in bad.stdout and "a.mp4: not a video" in bad.stdout


def test_png_is_read_back_by_another_decoder(tmp_path):
    import av
    frame = torch.randint(0, 256, (3, 37, 53), dtype=torch.uint8)
    (tmp_path / "f.png").write_bytes(png(frame))
    with av.open(str(tmp_path / "f.png")) as file:
        decoded = next(file.decode(video=0)).to_ndarray(format="rgb24")
    assert (torch.from_numpy(decoded).permute(2, 0, 1) == frame).all()


# ------------------------------------------------------------------------------------------------------------
# An endpoint that answers slowly, fails, and sends nonsense


class Endpoint(http.server.BaseHTTPRequestHandler):
    plan, seen, lock, under_way, most = [], [], threading.Lock(), 0, 0

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            cls = type(self)
            cls.seen.append((body, self.headers.get("Authorization")))
            cls.under_way += 1
            cls.most = max(cls.most, cls.under_way)
            action = cls.plan.pop(0) if cls.plan else "ok"
        time.sleep({"slow": 1.5}.get(action, 0.05))
        prompt = body["messages"][0]["content"][-1]["text"]
        text = prompt.split("prompt:\n")[1].split("\n")[0]
        content = json.dumps({"choices": [{"message": {"content": f"<think>{text}</think>{ANSWER}"}}]})
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

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    handler = type("Fresh", (Endpoint,), {"plan": [], "seen": [], "under_way": 0, "most": 0})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield handler
    server.shutdown()
    server.server_close()


def make_api(endpoint, **options):
    return Api(endpoint.url, "judge-1", SETTINGS,
               **{"first_wait": 0.01, "timeout": 0.8, "parallel": 3} | options)


def make_keys(world_dir, count=8):
    pairs = read_pairs(world_dir / "train.jsonl")
    return [key for pair in pairs for key in pair.videos()][:count]


def test_the_api_is_asked_with_frames_and_answers_come_in_order(endpoint, world_dir):
    endpoint.plan[:] = ["slow", "429", "nonsense", "odd", "500", "empty", "cut", "ok"]
    keys = make_keys(world_dir)
    found = list(make_api(endpoint, key="secret")(keys, {}))
    assert [(record["video"], record["prompt"]) for record in found] == keys
    thoughts = [record["cot"].split("</think>")[0] for record in found]
    assert thoughts == [f"<think>{prompt}" for _, prompt in keys]
    body, key = endpoint.seen[0]
    assert key == "Bearer secret" and body["model"] == "judge-1"
    images = [part for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    assert len(images) == 8  # frames of a toy clip
    assert base64.b64decode(images[0]["image_url"]["url"].split(",")[1]).startswith(b"\x89PNG")
    assert len(endpoint.seen) == 8 + 7  # each of the seven troubles is asked again, once
    assert endpoint.most <= 3 + 1  # three at a time, and the server may still hold the one that timed out


def test_the_api_is_not_asked_again(endpoint, world_dir):
    keys = make_keys(world_dir, 4)
    (record,) = make_api(endpoint)(keys, dict.fromkeys(keys[:3], ""))
    assert (record["video"], record["prompt"]) == keys[3] and len(endpoint.seen) == 1


@pytest.mark.parametrize(("plan", "message"),
                         [(["401"] * 9, "HTTP 401"), (["500"] * 9, "gave up on .* after 3 attempts"),
                          (["nonsense"] * 9, "no chat completion")])
def test_the_api_gives_up_with_a_clear_error(endpoint, world_dir, plan, message):
    endpoint.plan[:] = plan
    with pytest.raises(DataError, match=message):
        list(make_api(endpoint, retries=2, parallel=1)(make_keys(world_dir, 1), {}))


def test_annotate_by_api_survives_a_failure_in_the_middle(endpoint, world_dir, tmp_path):
    command = ["data.py", "annotate", world_dir / "train.jsonl", tmp_path / "out.jsonl", "--api",
               endpoint.url, "--api-model", "judge-1",
               "--scores", "--parallel", 1, "--retries", 0, *TOY_VIDEO]
    endpoint.plan[:] = ["ok"] * 5 + ["401"]
    failed = run(*command, check=False)
    assert failed.returncode == 1 and "HTTP 401" in failed.stderr and "Traceback" not in failed.stderr
    asked = len(endpoint.seen)
    done = run(*command)
    assert "going on after 5 of 24 videos" in done.stdout
    assert len(endpoint.seen) - asked == 24 - 5
    pairs = read_pairs(tmp_path / "out.jsonl")
    assert len(pairs) == 12 and all(p.scores_a == SCORES and p.prompt in p.cot_a for p in pairs)
