"""What tests/compare_trees.py runs its commands on, and what it asks through Python and HTTP."""

import asyncio
import base64
import csv
import hashlib
import http.server
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from compare_cases import COLD, TEST

DATA = "../../data"  # from a case's folder
NAMES = ("subject", "dynamics", "camera", "environment", "style")

# ------------------------------
# What cases call by name, in a process of a tree: "api NAME …" and "endpoint KIND"


def show(value) -> None:
    print(json.dumps(value, default=str), flush=True)


def frames(path: str):
    """All frames of a video, (T, H, W, 3) uint8."""
    import av
    import numpy as np
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def videos() -> tuple[list[str], list[str]]:
    """Four videos, of which one is broken, and their prompts."""
    names = ["test_id_00000_a", "test_id_00000_b", "cut", "test_ood_00001_a"]
    paths = [f"{DATA}/world/videos/{name}.mp4" for name in names]
    return paths, ["A red circle moves left.", "A blue cross."] * 2


def api_judge() -> None:
    from infer import judge
    from model import DeScore
    model = DeScore.load(f"{DATA}/model")
    keys = list(zip(*videos()))
    for options in ({}, {"temperature": 0.7, "seed": 3, "samples": 2}, {"think": False},
                    {"without_cot": True}, {"think_tokens": 80, "done": keys[:1], "repetition_penalty": 1.2},
                    {"numbers": [7, 3, 5, 1], "temperature": 0.7, "workers": 1, "finite": False}):
        show(sorted(judge(model, keys, max_new_tokens=30, **options), key=str))


def api_reward() -> None:
    from infer import reward
    from model import DeScore
    model = DeScore.load(f"{DATA}/model")
    paths, prompts = videos()
    array = frames(paths[0])
    for options in ({}, {"samples": 2, "seed": 3}, {"temperature": 0.6, "seed": 3}, {"think": False},
                    {"standardise": False}, {"think_tokens": 80}):
        show(reward(model, paths, prompts, **{"max_new_tokens": 30, **options}))
    show(reward(model, array, prompts[0], fps=4, max_new_tokens=30))
    show(reward(model, array.transpose(3, 0, 1, 2), prompts[0], fps=8, layout="CTHW", max_new_tokens=30))


def api_scorer() -> None:
    from infer import Scorer
    scorer = Scorer(f"{DATA}/model", "cpu", window=1.0, reader="decord")
    paths, prompts = videos()
    show(scorer(paths, prompts, max_new_tokens=30))
    found = {}

    def ask(place: int) -> None:
        found[place] = scorer([paths[place]], prompts[place], max_new_tokens=30, samples=2, seed=1)

    threads = [threading.Thread(target=ask, args=[place]) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    show([found[place] for place in range(4)])


def api_client(url: str) -> None:
    from support.client import Client
    client = Client(url, timeout=100, parallel=1, attempts=2)
    paths, _ = videos()
    show(client([*paths, "none.mp4"], "A red circle moves left."))


def api_arrays(url: str) -> None:
    from support.client import Client

    client = Client(url)
    paths, prompts = videos()
    array = frames(paths[1])
    show(client(array / 255, prompts[1], fps=8))
    show(client([array.transpose(3, 0, 1, 2)], prompts[:1], fps=[4], layout="CTHW"))


def api_adapters(url: str) -> None:
    import torch

    from support.adapters import FlowFactory, VideoAlign, VideoXFun, compute_score_descore, flow_grpo
    from support.client import Client
    score = Client(url, parallel=1)
    paths, prompts = videos()
    paths, prompts = paths[:2], prompts[:2]
    clips = torch.stack([torch.from_numpy(frames(path)) for path in paths]).permute(0, 1, 4, 2, 3) / 255
    rewards, rest = flow_grpo(score, fps=4)("cpu")(clips, prompts, {})
    show([[round(float(reward), 5) for reward in rewards], rest])  # a list before, a tensor now
    show(VideoAlign(score).reward(paths, prompts))
    show(VideoAlign(score, unusable=-2.0).reward([paths[0], "none.mp4"], prompts, use_norm=False))
    factory = FlowFactory()
    factory.score, factory.fps = score, 4
    found = factory(prompts, video=list(clips))
    show([found.rewards.tolist(), found.extra_info])
    show(VideoXFun(score, 8.0).get_reward(clips.transpose(1, 2), prompts).tolist())
    show(asyncio.run(compute_score_descore("", clips[0], prompts[0], {"fps": 4}, server_url=url)))


def request(url: str, body: dict | None = None) -> list:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=100) as answer:
            return [answer.status, json.load(answer)]
    except urllib.error.HTTPError as error:
        return [error.code, dict(error.headers).get("retry-after"), error.read().decode()]


def pngs(path: str, size: int = 64) -> list[str]:
    from PIL import Image
    found = []
    for number, frame in enumerate(frames(path)):
        Image.fromarray(frame).resize((size, size)).save(f"{number}.png")
        found.append(base64.b64encode(Path(f"{number}.png").read_bytes()).decode())
        os.remove(f"{number}.png")
    return found


def api_frames(url: str) -> None:
    paths, prompts = videos()
    clips = [pngs(paths[0]), pngs(paths[1]), ["bm8gcG5n"], []]
    show(request(url + "/health"))
    show(request(url + "/rewards"))
    show(request(url + "/compute", {"prompt": prompts, "video": clips}))
    show(request(url + "/compute", {"prompt": prompts[:2], "video": clips[:2], "fps": [8, 2]}))
    show(request(url + "/compute", {"prompt": prompts[:1], "video": clips[:1], "kwargs": {"fps": 16}}))
    show(request(url + "/compute", {"prompt": prompts[:1], "video": clips[:2]}))
    show(request(url + "/compute", {"prompt": "no list"}))
    show(request(url + "/none", {}))


def api_files(url: str, kinds: str = "path b64") -> None:
    """Ask about files, named and sent; of what is sent the draws are others each time."""
    paths, prompts = videos()
    turns = []
    for path, prompt in zip(paths, prompts):
        if "path" in kinds:
            turns.append({"text": prompt, "video_path": path.removeprefix(f"{DATA}/world/")})
        if "b64" in kinds:
            turns.append({"text": prompt, "video_b64": base64.b64encode(Path(path).read_bytes()).decode()})
    turns += [{"text": "outside", "video_path": "../model/descore.json"}, {"text": "neither"}]
    for turn in turns:
        asked = [{"history": [turn], "required_rewards": ["descore"], "request_id": 7}]
        show(request(url + "/score", {"requests": asked}))
    show(request(url + "/compute", {"prompt": prompts[:1], "video": [pngs(paths[0])], "fps": 4}))
    show(request(url + "/compute", {"prompt": prompts[:1], "video": [pngs(paths[0], 300)[:3] * 3], "fps": 4}))
    show(request(url + "/score", {"requests": [{"history": turns[:1], "required_rewards": ["other"]}]}))


def api_busy(url: str) -> None:
    """While the body of one request does not come, there is no room for another."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as waiting:
        waiting.sendall(b"POST /compute HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n\r\n{")
        while request(url + "/health")[1]["under_way"] == 0:
            time.sleep(0.01)
        show(request(url + "/compute", {"prompt": [], "video": []}))


def endpoint(kind: str) -> None:
    """Answer chat completions by the digest of what is asked, and print at the end what was asked. The kind
    "together" answers about two videos, "breaks" fails at each fifth request, "slow" takes two seconds."""
    asked, under_way, at_once, numbers = [], set(), [0], count(1)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            under_way.add(self)
            at_once.append(len(under_way))
            record = json.loads(self.rfile.read(int(self.headers["content-length"])))
            content = record.pop("messages")[0]["content"]
            about = hashlib.sha256(json.dumps(content).encode()).hexdigest()
            asked.append([self.path, self.headers["authorization"], record, len(content), about])
            time.sleep(2 if kind == "slow" else 0.1)
            message = {"role": "assistant", "content": answer(kind, random.Random(about))}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            said = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge"}
            body = json.dumps(said | {"choices": [choice]}).encode()
            under_way.discard(self)
            self.send_response(503 if kind == "breaks" and next(numbers) % 5 == 0 else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments) -> None:
            pass

    def end(number, frame) -> None:
        for record in sorted(asked, key=str):
            show(record)
        show({"at a time": "one" if max(at_once) < 2 else "several"})
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


def answer(kind: str, draw: random.Random) -> str:
    """What the endpoint says; one answer of eight has no scores."""
    if draw.random() < 1 / 8:
        return "I cannot say."
    if kind != "together":
        return cot({name: draw.choice([0, 1, 2]) for name in NAMES}, f"{draw.random()}")
    found = {}
    for video in ("video_1", "video_2"):
        found[f"{video}_scores"] = {name: draw.choice([0, 1, 2, "N/A"]) for name in NAMES}
        found[f"{video}_overall"] = draw.randint(10, 50) / 10
    return f"<think>both</think><answer>{json.dumps(found)}</answer>"


# ------------------------------
# The inputs

REWARDS = '''"""Rewards of a user's own."""


def vowels(text, n_tokens, gold, args):
    return sum(letter in "aeiou" for letter in text) / (1 + n_tokens + args.seed) + len(str(gold)) / 1000


def quality_reward(text, n_tokens, gold, processor):
    return 0.5 if gold["camera"] == "N/A" else len(processor.encode(text)) / 100 - gold["camera"]


def format_reward(text, n_tokens, gold):
    return n_tokens % 2


def fails(text, n_tokens, gold):
    raise ValueError("it fails")
'''
ASK = "Watch this: <video> It was asked for by: <prompt> Does it follow? Judge subject, dynamics, camera."
SHARED = {"out": "run", "batch-size": 3, "lora_rank": 4, "min_pixels": 4096, "max_pixels": 4096,
          "workers": 0, "max_new_tokens": 20, "lr": 0.001, "eval_before": False}
BASE = {"coldstart": {"model": f"{DATA}/backbone", "epochs": 2, "mask_p": 0.9} | SHARED,
        "rl": {"model": f"{DATA}/model", "updates": 1, "group_size": 3, "dual_clip": None, "reward": []}
              | SHARED}
OWN = {"coldstart": {"preset": "base.json", "head_lr": 0.05, "epochs": 1, "label": None},
       "rl": {"preset": "base.json", "steps": 2, "test": [f"{DATA}/world/test_ood.jsonl"]}}


def cot(scores: dict, seen: str) -> str:
    """A CoT that gives these sub-scores, in the thought too."""
    lines = [f"{name}: asked for and seen, so {score}" for name, score in scores.items()]
    said = json.dumps({"dimensional_scores": scores, "overall_score": 3.4})
    thought = "\n".join([seen, *lines])
    return f"<think>\n{thought}\n</think>\n<answer>\n{said}\n</answer>"


def in_other_words(text: str) -> str:
    """A CoT with other tags and another dimension."""
    for ours, theirs in (("think>", "reason>"), ("answer>", "verdict>"), ("style", "taste")):
        text = text.replace(ours, theirs)
    return text


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_table(path: Path, records: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def steps(data: Path, old: Path) -> Iterator[tuple[str, list[str]]]:
    """Make the inputs. What OLD has to do for it is yielded as cases: their names and commands."""
    world, lists = data / "world", data / "lists"
    lists.mkdir(parents=True)
    yield "inputs-world", ["toy/world.py DATA/world --pairs 8 --test-pairs 4 --seed 3"]
    shutil.copytree(old / "toy/backbone", data / "backbone")
    clips = world / "videos"
    whole = (clips / "train_00003_a.mp4").read_bytes()
    (clips / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (clips / "empty.mp4").touch()
    write_pair_files(data, world)
    write_tables(lists, read_lines(world / "train_cots.jsonl"), read_lines(world / "test_ood.jsonl"))
    together = "Two videos.\n" + (old / "presets/together.txt").read_text()
    for name, text in (("ask.txt", ASK), ("together.txt", together), ("reward.py", REWARDS),
                       ("own.json", json.dumps(OWN)), ("base.json", json.dumps(BASE))):
        (data / name).write_text(text)
    # A model that thinks in the format, and is measured, so that it has a scale.
    yield "inputs-model", [f"{COLD} {TEST} --lr 3e-3 --head-lr 0.1 --max-new-tokens 120 --out DATA/model",
                           "api actor"]
    shutil.copytree(data / "model", data / "other")
    path = data / "other/model/descore.json"
    changed = {"dimensions": {"subject": 3, "dynamics": 1, "camera": 1, "environment": 1, "taste": 2},
               "tags": ["reason", "verdict"], "instruction": ASK}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def write_pair_files(data: Path, world: Path) -> None:
    """Pair files in our own format. A and B, and the CoTs about them, differ; one pair is a tie."""
    train, tests = read_lines(world / "train.jsonl"), read_lines(world / "test_id.jsonl")
    train[1]["preference"] = tests[1]["preference"] = "tie"
    write_lines(world / "train.jsonl", train)
    write_lines(world / "test_id.jsonl", tests)
    for number, pair in enumerate(train):
        for side in "ab":
            pair[f"cot_{side}"] = cot(pair[f"scores_{side}"], "seen " * (number % 4 + 3 * (side == "b")))
    write_lines(world / "train_cots.jsonl", train)
    for name, pairs in (("broken", train), ("test_broken", tests)):
        broken = [dict(pair) for pair in pairs]
        broken[0]["video_b"] = "videos/cut.mp4"
        broken[2]["video_a"] = "videos/empty.mp4"
        broken.append(broken[3] | {"video_a": "videos/missing.mp4"})
        write_lines(world / f"{name}.jsonl", broken)
    problem = "Is <video> like this: {}? Think, then answer in JSON."
    problems = [pair | {"problem": problem.format(pair["prompt"])} for pair in tests]
    write_lines(world / "problems.jsonl", problems)
    write_lines(data / "other.jsonl", [
        {"prompt": pair["prompt"], "preference": pair["preference"], "video_a": f"world/{pair['video_a']}",
         "video_b": f"world/{pair['video_b']}", "cot_a": in_other_words(pair["cot_a"]),
         "cot_b": in_other_words(pair["cot_b"])} for pair in train])
    thirds = ("cut", "test_ood_00001_a", "train_00001_b", "train_00002_b")
    write_lines(data / "groups.jsonl", [
        {"prompt": pair["prompt"], "models": [pair["model_a"], None, "third"],
         "videos": [f"world/{pair['video_a']}", f"world/{pair['video_b']}", f"world/videos/{third}.mp4"]}
        for pair, third in zip(tests, thirds)])


def write_tables(lists: Path, train: list[dict], tests: list[dict]) -> None:
    """Pairs as CSV files of each kind; in VideoAlign's the labels of each column are others."""
    other = {"A": "B", "B": "A", "tie": "A"}
    votes = {"A": "leftvote", "B": "rightvote", "tie": "tievote"}
    rows = []
    for number, pair in enumerate(tests):
        rows.append({"path_A": pair["video_a"], "path_B": pair["video_b"], "prompt": pair["prompt"],
                     "A_model": pair["model_a"], "B_model": pair["model_b"],
                     "VQ": "invalid" if number == 2 else other[pair["preference"]],
                     "TA": pair["preference"].replace("tie", "same"), "Overall": "A"})
    write_table(lists / "videoalign.csv", rows)
    write_table(lists / "genai.csv", [
        {"left_video": pair["video_a"], "right_video": pair["video_b"], "prompt": pair["prompt"],
         "left_model": pair["model_a"], "right_model": pair["model_b"],
         "vote_type": votes[pair["preference"]]} for pair in tests])
    winners = {"A": "Video 1 is better.", "B": "video 2 is better", "tie": "Both are alike"}
    stage_1, stage_2, evaluation = [], [], []
    for pair in train:
        answer = json.dumps({"gsb_result": winners[pair["preference"]], "video_1_scores": pair["scores_a"],
                             "video_2_scores": pair["scores_b"]})
        videos = {"videos": str([pair["video_a"], pair["video_b"]]), "prompt": pair["prompt"]}
        stage_1.append(videos | {"GSB": pair["preference"].replace("tie", "same"), "CoT_A": pair["cot_a"],
                                 "CoT_B": pair["cot_b"]})
        stage_2.append(videos | {"answer": f"<answer>{answer}</answer>"})
        evaluation.append({"video_A": pair["video_a"], "video_B": pair["video_b"],
                           "prompt": pair["prompt"], "answer": answer})
    write_table(lists / "stage1.csv", stage_1)
    write_table(lists / "stage2.csv", stage_2)
    write_table(lists / "evaluation.csv", evaluation)


def api_actor() -> None:
    """Write what the authors' stage 2 leaves: the backbone with a row <Reward>, and rm_head.pth above it."""
    import torch
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
    torch.manual_seed(5)
    tokenizer = AutoTokenizer.from_pretrained(f"{DATA}/backbone")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<Reward>"]})
    qwen = Qwen3VLForConditionalGeneration.from_pretrained(f"{DATA}/backbone", dtype=torch.float32)
    qwen.resize_token_embeddings(len(tokenizer))
    qwen.get_input_embeddings().weight.data[-1].normal_(std=0.05)
    for part in (tokenizer, qwen):
        part.save_pretrained(f"{DATA}/actor/huggingface")
    head = torch.randn(1, qwen.config.text_config.hidden_size)
    torch.save({"model": {"rm_head.weight": head}}, f"{DATA}/actor/rm_head.pth")
    shutil.copytree(f"{DATA}/actor", f"{DATA}/small_actor")
    seen = {"video": {"min_pixels": 4096, "max_pixels": 4096}}
    Path(f"{DATA}/small_actor/huggingface/descore.json").write_text(json.dumps(seen))
