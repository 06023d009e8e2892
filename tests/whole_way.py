"""Go the whole way of docs/training.md with a few clips of the toy: its commands, word for word.

    python tests/whole_way.py FOLDER     # a new folder; some two minutes on two cores

Only numbers, names and paths are others: two ranks, the embedded backbone, a stand-in for the endpoint that
answers with the truth. Each command has to end well and to leave what the next one needs.
"""

import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import av
import numpy as np
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]

import world

from data import VideoSettings, overall_score, read_video
from tools.shown import data_url

PAGE = "docs/training.md"
QUICK = {"batch_size": 2, "min_pixels": 4096, "max_pixels": 4096, "lora_rank": 4, "max_new_tokens": 140,
         "eval_before": False, "workers": 0}
SETTINGS = {"coldstart": QUICK | {"epochs": 1, "head_lr": 1e-2},
            "rl": QUICK | {"steps": 2, "updates": 1, "group_size": 2, "lr": 1e-3}}
GOOD, BAD, TESTS = 6, 1, 2  # pairs to train on whose truth implies the label, and does not; held-out ones


def shown() -> tuple[list[list[str]], str]:
    """What the page's section shows: its commands, in words, with the variables that are set for them in
    front; and its Python."""
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    section = page.partition("## The whole way\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    lines = re.findall(r"^ {4}([A-Z]\S*=\S+ .*|(?:python|torchrun) .*)$",
                       re.sub(r"\\\n\s*", "", section), re.MULTILINE)
    return [shlex.split(line) for line in lines], code


# ------------------------------
# What a user has: videos, files of pairs, an endpoint


def make_pairs(folder: Path) -> list[dict]:
    """Render clips, and write pairs.csv and test.csv as VideoAlign's are. Returns the pairs to train on."""
    rng = np.random.default_rng(0)
    (folder / "videos").mkdir()
    wanted = {"pairs": {True: GOOD, False: BAD}, "test": {True: TESTS, False: 0}}
    found = {}
    for name, of_kind in wanted.items():
        rows = ["path_A,path_B,prompt,VQ,MQ,TA"]
        pairs = found[name] = []
        while sum(of_kind.values()):
            pair, clips = world.draw_pair("train", rng)
            a, b = (overall_score(pair[f"scores_{side}"], world.DIMENSIONS) for side in "ab")
            is_good = {"A": a > b, "B": a < b}.get(pair["preference"])
            if not of_kind.get(is_good):
                continue
            of_kind[is_good] -= 1
            for side, clip in zip("ab", clips):
                pair[f"video_{side}"] = f"videos/{name}_{len(pairs)}_{side}.mp4"
                world.write_video(folder / pair[f"video_{side}"], world.render(clip, rng))
            pairs.append(pair)
            rows.append(f'{pair["video_a"]},{pair["video_b"]},"{pair["prompt"]}",same,B,{pair["preference"]}')
        (folder / f"{name}.csv").write_text("\n".join(rows) + "\n")
    world.write_video(folder / "video.mp4", world.render(clips[0], rng), fps=16)
    with av.open(str(folder / "video.mp4")) as file:
        np.save(folder / "frames.npy", [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    return found["pairs"]


def pictures_of(path: Path) -> tuple[str, ...]:
    """The frames of a video as an endpoint is sent them."""
    frames, _ = read_video(str(path), VideoSettings(max_pixels=307_200))
    return tuple(data_url(frame) for frame in frames)


class Endpoint(BaseHTTPRequestHandler):
    """Answers with the CoT that `answers` has for the pictures that it is shown."""

    answers: ClassVar[dict[tuple[str, ...], str]] = {}
    keys: ClassVar[list[str]] = []

    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = question["messages"][0]["content"]
        pictures = tuple(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
        self.keys.append(self.headers["Authorization"])
        answer = {"choices": [{"message": {"content": self.answers[pictures]}}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args):
        pass


def written(scores: dict) -> str:
    """A CoT that says these sub-scores."""
    return f"<think>\nseen\n</think>\n<answer>{json.dumps({'dimensional_scores': scores})}</answer>"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# ------------------------------
# The way


def go(folder: Path) -> None:
    """Run the page's commands in order. Raises AssertionError where one does not do its part."""
    commands, code = shown()
    pairs = make_pairs(folder)
    (folder / "my.json").write_text(json.dumps(SETTINGS))
    shutil.copy(ROOT / "tools/client.py", folder)
    for pair in pairs:
        for side in "ab":
            pictures = pictures_of(folder / pair[f"video_{side}"])
            Endpoint.answers[pictures] = written(pair[f"scores_{side}"])
    endpoint = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=endpoint.serve_forever, daemon=True).start()
    port = str(free_port())
    here = {"8": "2", "8000": port, "Qwen/Qwen3-VL-8B-Instruct": "toy/backbone", "NAME": "stand-in",
            "https://HOST/v1": f"http://127.0.0.1:{endpoint.server_port}/v1"}
    environment = os.environ | {"PET_MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    programs = Path(sys.executable).parent
    step = iter(commands)

    def start(beginning: str) -> subprocess.Popen:
        """Start the page's next command, which has to begin so."""
        words = next(step)
        own = dict(environment)
        while "=" in words[0]:
            name, _, _ = words.pop(0).partition("=")
            own[name] = "a-key"
        assert " ".join(words).startswith(beginning), words
        for place, word in enumerate(words):
            is_ours = word.endswith((".csv", ".jsonl", ".json", ".mp4")) or word.startswith("runs/")
            words[place] = str(folder / word) if is_ours else here.get(word, word)
        print("$", *words, flush=True)
        words[0] = str(programs / words[0])
        return subprocess.Popen(words, cwd=ROOT, env=own, text=True, stdout=subprocess.PIPE)

    def run(beginning: str) -> str:
        """Run it to its end, which has to be a good one. Returns what it printed."""
        process = start(beginning)
        said, _ = process.communicate()
        assert process.returncode == 0, (beginning, process.returncode, said)
        return said

    def rows(name: str) -> list[dict]:
        return [json.loads(line) for line in (folder / name).read_text().splitlines()]

    def trained(name: str, steps: int) -> dict:
        """The adapter that a stage left, whose log has to be whole."""
        log = rows(f"runs/{name}/metrics.jsonl")
        assert [line["step"] for line in log if "loss" in line] == [*range(1, steps + 1)]
        assert math.isfinite(log[-1]["test/accuracy"])
        return load_file(folder / f"runs/{name}/model/adapter_model.safetensors")

    said = run("python -m tools.check")
    assert f"videos: {2 * len(pairs)} read, 0 broken" in said
    run("python -m tools.annotate")
    annotated = rows("annotated.jsonl")
    assert [row["cot_b"] for row in annotated] == [written(pair["scores_b"]) for pair in pairs]
    run("python -m tools.filter")
    assert len(rows("train_cots.jsonl")) == GOOD
    run("torchrun --nproc_per_node 8 coldstart.py")
    first = trained("8b-coldstart", math.ceil(GOOD / 2))
    run("python -m tools.annotate")
    references = rows("references.jsonl")
    assert [row["scores_a"] for row in references] == [pair["scores_a"] for pair in pairs]
    assert Endpoint.keys == ["Bearer a-key"] * 4 * len(pairs)
    endpoint.shutdown()
    run("python -m tools.filter")
    assert len(rows("train_scores.jsonl")) == GOOD
    run("torchrun --nproc_per_node 8 rl.py")
    second = trained("8b-rl", SETTINGS["rl"]["steps"])
    assert first.keys() == second.keys() and any((first[name] != second[name]).any() for name in first)
    assert len(rows("runs/8b-rl/rollouts.jsonl")) == 2 * 4  # of two videos of two pairs at each step
    said = run("python infer.py")
    score = float(re.search(r"^score +([+-][\d.]+)", said, re.MULTILINE)[1])
    serving = start("python -m tools.serve")
    try:
        assert serving.stdout.readline().endswith(f": http://127.0.0.1:{port}\n")
        given = ["import numpy", 'frames = numpy.load("frames.npy")', 'prompts = ["a red circle moves left"]']
        code = "\n".join([*given, code.replace("8000", port)])
        print(">>>", code, flush=True)
        client = [sys.executable, "-c", code]
        said = subprocess.run(client, cwd=folder, check=True, text=True, stdout=subprocess.PIPE).stdout
        assert abs(float(said.split()[0]) - score) < 1e-3 and said.split()[1:] == ["None"], (said, score)
    finally:
        serving.send_signal(signal.SIGTERM)
        serving.communicate()
    assert serving.returncode == 0
    assert next(step, None) is None, "the page has a command more"


if __name__ == "__main__":
    place = Path(sys.argv[1]).resolve()
    place.mkdir(parents=True)
    go(place)
