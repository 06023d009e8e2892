"""Do two trees of the project do the same? Runs every command and flag in both, and compares all they leave.

    python tests/compare_trees.py OLD NEW --keep DIR    # a table; exit code 1 if anything differs
    python tests/compare_trees.py OLD NEW --only 'rl*'  # some cases, and those that they build on
    python tests/compare_trees.py OLD OLD --effects     # which flags change nothing that is compared

A case (`CASES`) is a list of commands, run in a folder of its own, DIR/old/CASE and DIR/new/CASE, on inputs
that OLD makes (DIR/data). Commands have their old names: NEW answers them through its stubs. Compared are
stdout, stderr, exit codes and all files: floats to the bit; not compared are times and digests of code. A flag of
OLD without a case, or given with its default alone, is an error. What differs on purpose stands in DELIBERATE.
"""

import argparse
import asyncio
import base64
import hashlib
import http.server
import importlib
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import count, zip_longest
from multiprocessing import get_context
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
FORK = get_context("fork")
# Imported once, before the forks; nothing of either tree is among them.
PRELOADED = ("torch", "torch.distributed.fsdp", "transformers.models.qwen3_vl.modeling_qwen3_vl", "tqdm", "openai",
             "transformers.models.auto.tokenization_auto", "peft", "av", "uvicorn", "fastapi", "PIL.Image")
TIMEOUT = 300  # seconds that a command may take

# ------------------------------
# What differs on purpose: case, file (patterns), reason

DELIBERATE: list[tuple[str, str, str]] = [
]

# ------------------------------
# The cases. Before a command may stand: ranks=2, so many processes in a group; die=PLACE and stop=PLACE, kill -9
# and SIGTERM at the moment at which a file is renamed to PLACE; NAME=VALUE, of the environment. "&" keeps it
# running to the case's end, and $URL is then the address that it printed. "$ …" is for the shell, "api NAME …"
# and "endpoint KIND" call a function below, "like A B" compares two folders within a tree.

SMALL = "--min-pixels 4096 --max-pixels 4096 --lora-rank 4 --lr 1e-2 --workers 0"
COLD = ("coldstart.py --model DATA/backbone --train DATA/world/train_cots.jsonl --out run --epochs 1 "
        f"--batch-size 4 --max-new-tokens 30 {SMALL}")
RL = ("rl.py --model DATA/model --train DATA/world/train.jsonl --out run --steps 3 --batch-size 2 --updates 2 "
      f"--group-size 3 --length-low 15 --length-high 35 --max-new-tokens 40 {SMALL}")
WHOLE = "--lora-rank 0 --shard full --lr 1e-3 --max-new-tokens 12 --save-every 1"
TEST = "--test DATA/world/test_id.jsonl"
TESTS = f"{TEST} DATA/world/test_ood.jsonl"
PRESET = "--shard none --lr 1e-3 --batch-size 4 --max-new-tokens 30 --max-pixels 4096 --min-pixels 4096 --workers 0"
PRESET_RL = f"{RL} {PRESET} --steps 1 --updates 2 --batch-size 2 --group-size 3 --lora-rank 0"
ONE = "DATA/world/videos/test_id_00000_a.mp4"
TWO = "DATA/world/videos/test_id_00000_b.mp4"
PROMPT = "'A red circle moves left, at night.'"
MODEL = "--model DATA/model"
JUDGE = f"infer.py {MODEL} --max-new-tokens 120"
ANNOTATE = "-m support.annotate DATA/world/test_id.jsonl out.jsonl"
API = "--api $URL/v1 --api-model judge"
PAIRS = f"-m support.pairs DATA/groups.jsonl out.jsonl {MODEL} --max-new-tokens 110"
PROBE = f"-m support.probe DATA/world/test_id.jsonl {MODEL} --max-new-tokens 110"
SERVE = f"-m support.serve {MODEL} --port 0 --max-new-tokens 25"


def resumed(name: str, command: str, ranks: str = "") -> dict[str, list[str]]:
    """A run, and the same killed and stopped in its middle, each of which is to end as the first."""
    again = [f"{ranks} {command}", f"like ../{name}/run run"]
    return {name: [f"{ranks} {command}"],
            f"{name}-killed": [f"{ranks} die=step-2 {command}", *again],
            f"{name}-stopped": [f"{ranks} stop=step-1 {command}", *again]}


CASES: dict[str, list[str]] = {
    # ---- stage 1
    **resumed("coldstart", f"{COLD} {TEST} --save-every 1"),
    **resumed("coldstart-ranks", f"{COLD} {TEST} --save-every 1", "ranks=2"),
    **resumed("coldstart-shards", f"{COLD} {WHOLE}", "ranks=2"),
    "coldstart-schedule": [
        f"{COLD} {TESTS} --backbone DATA/backbone --seed 5 --head-lr 3e-3 --warmup 0.7 --weight-decay 0.5 "
        "--max-grad-norm 0.3 --mask-p 0.3 --epochs 2 --max-tokens 700 --keep 3 --save-every 1 --keep-rollouts 2 "
        "--eval-every 2 --eval-temperature 0.5 --eval-tokens 900 --no-eval-before --no-gradient-checkpointing "
        "--reader decord --workers 1 --log tensorboard"],
    "coldstart-inputs": [
        f"{COLD} --train DATA/lists/stage1.csv --root DATA/world --test DATA/lists/videoalign.csv --label VQ "
        "--max-skipped 0.5 --instruction DATA/ask.txt --fps 1 --min-pixels 9000 --max-pixels 20000 --max-prompt 230 "
        "--think-tokens 700 --eval-before false --gradient-checkpointing false"],
    "coldstart-vision": [f"{COLD} --train-vision true --no-train-merger"],
    "coldstart-merger": [f"{COLD} --train-merger false --keep 1 --save-every 1"],
    "coldstart-whole": [f"{COLD} --lora-rank 0 --optim adamw8bit --lr 1e-3"],
    "coldstart-4bit": [f"{COLD} --quant 4bit --optim adamw8bit --save-every 0"],
    "coldstart-expected": [f"{COLD} --mask expected --mask-p 0.3"],
    "coldstart-unreadable": [
        f"{COLD} --train DATA/world/broken.jsonl",
        f"{COLD} --train DATA/world/broken.jsonl --max-skipped 0.4 --resume false --test DATA/world/test_broken.jsonl"],
    "coldstart-resume": [
        "$ cp DATA/world/train_cots.jsonl train.jsonl",
        f"{COLD} --train train.jsonl --root DATA/world --save-every 1",
        f"{COLD} --train train.jsonl --root DATA/world --save-every 1",
        f"{COLD} --train train.jsonl --root DATA/world --lr 2e-3",
        "$ sed -i 's/seen/watched/' train.jsonl; rm -r run/checkpoints/step-3 run/model",
        f"{COLD} --train train.jsonl --root DATA/world --resume true",
        f"{COLD} --train train.jsonl --root DATA/world --resume insist",
        f"{COLD} --train train.jsonl --root DATA/world --resume false --seed 3",
        "$ rm -r run/checkpoints",
        f"{COLD} --train train.jsonl --root DATA/world"],
    "coldstart-paper": [f"{COLD} --preset presets/paper.json {PRESET}"],
    "coldstart-release": [f"{COLD} --preset presets/release.json {PRESET}"],
    "coldstart-moved": [f"{COLD} --preset support/release.json {PRESET}"],
    "coldstart-strict": [f"{COLD} --preset presets/strict.json {PRESET}"],
    "coldstart-preset": [f"coldstart.py --preset DATA/own.json {TEST} --head-lr none --train DATA/world/train_cots.jsonl"],
    "coldstart-embedded": [
        "$ mkdir runs; cp -r DATA/world runs/toy",
        f"coldstart.py --epochs 1 --out run --max-new-tokens 20 --batch-size 6 {TEST}"],
    # ---- stage 2
    **resumed("rl", f"{RL} {TEST} --save-every 1"),
    **resumed("rl-ranks", f"{RL} {TEST} --save-every 1", "ranks=2"),
    **resumed("rl-shards", f"{RL} {WHOLE}", "ranks=2"),
    "rl-schedule": [
        f"{RL} {TESTS} --backbone DATA/model --seed 5 --weight-decay 0.5 --max-grad-norm 0.3 --max-tokens 700 "
        "--keep 1 --save-every 2 --keep-rollouts 2 --eval-every 2 --eval-temperature 0.5 --think-tokens 900 "
        "--no-eval-before --no-gradient-checkpointing --reader decord --workers 1 --log tensorboard --updates 1"],
    "rl-inputs": [
        f"{RL} --train DATA/lists/stage2.csv --root DATA/world --test DATA/lists/videoalign.csv --label VQ "
        "--max-skipped 0.5 --instruction DATA/ask.txt --fps 1 --min-pixels 9000 --max-pixels 20000 --max-prompt 230 "
        "--eval-tokens 700 --eval-before false --gradient-checkpointing false --keep 3 --save-every 1"],
    "rl-rewards": [
        f"{RL} --w-format 0.3 --w-quality 0.5 --w-length 0.4 --length-excess 36 --reward DATA/reward.py:vowels=0.5 "
        "DATA/reward.py:quality_reward --no-advantage-std"],
    "rl-lengths": [
        f"{RL} --reward DATA/reward.py:vowels=0.5 --reward none --reward DATA/reward.py:format_reward "
        "--advantage-std false --group-size 4 --batch-size 3 --steps 2"],
    "rl-losses": [
        f"{RL} --loss-mean token --clip-low 0.01 --clip-high 0.02 --dual-clip 1.01 --log-ratio-bound 0.05 "
        "--kl-bound 0.0005 --beta 0.1 --bt-weight 0.5 --bt-pairs all --temperature 1.3 --top-p 0.9 --updates 2"],
    "rl-truncated": [f"{RL} --mask-truncated true --loss-mean constant --beta 0 --max-new-tokens 90"],
    "rl-merger": [f"{RL} --train-merger true"],
    "rl-whole": [f"{RL} --lora-rank 0 --optim adamw8bit --lr 1e-3"],
    "rl-4bit": [f"{RL} --quant 4bit --optim adamw8bit --save-every 0"],
    "rl-unreadable": [
        f"{RL} --train DATA/world/broken.jsonl --batch-size 4",
        f"{RL} --train DATA/world/broken.jsonl --batch-size 4 --max-skipped 0.4 --resume false "
        "--test DATA/world/test_broken.jsonl"],
    "rl-resume": [
        "$ cp DATA/reward.py reward.py",
        f"{RL} --reward reward.py:vowels=0.5 --save-every 1",
        f"{RL} --reward reward.py:vowels=0.5 --save-every 1 --steps 4",
        "$ sed -i 's/aeiou/xyz/' reward.py; rm -r run/checkpoints/step-3",
        f"{RL} --reward reward.py:vowels=0.5",
        f"{RL} --reward reward.py:vowels=0.5 --resume insist",
        f"{RL} --reward reward.py:vowels=0.5 --resume false --seed 3"],
    "rl-paper": [f"{PRESET_RL} --preset presets/paper.json"],
    "rl-release": [f"{PRESET_RL} --preset presets/release.json"],
    "rl-moved": [f"{PRESET_RL} --preset support/release.json --dual-clip none --reward none"],
    "rl-strict": [f"{PRESET_RL} --preset presets/strict.json --lora-rank 4 --max-new-tokens 120"],
    "rl-preset": ["rl.py --preset DATA/own.json --train DATA/world/train.jsonl"],
    "rl-untrained": [f"{RL} --model DATA/backbone --steps 1"],
    "rl-embedded": [
        "$ mkdir runs; cp -r DATA/world runs/toy; cp DATA/world/train.jsonl runs/toy/train_scores.jsonl",
        "$ cp -r DATA/model runs/coldstart",
        f"rl.py --steps 1 --batch-size 2 --group-size 3 --out run --max-new-tokens 20 --lora-rank 4 {TEST}"],
    # ---- infer
    "infer-one": [f"{JUDGE} {ONE} {PROMPT}", f"{JUDGE} {ONE} {PROMPT} --json --report page.html",
                  f"{JUDGE} {ONE} {PROMPT} --max-new-tokens 7", f"{JUDGE} DATA/world/videos/cut.mp4 {PROMPT}"],
    "infer-several": [
        f"{JUDGE} {ONE} {TWO} DATA/world/videos/cut.mp4 {PROMPT} --samples 3 --seed 4",
        f"{JUDGE} {ONE} {TWO} {PROMPT} --json --temperature 0.8 --seed 4",
        f"{JUDGE} {ONE} {TWO} {PROMPT} --report page.html --repetition-penalty 1.3",
        f"{JUDGE} {ONE} {TWO} {PROMPT} --cot off --instruction DATA/ask.txt --reader decord"],
    "infer-pairs": [
        f"{JUDGE} --pairs DATA/world/test_broken.jsonl --out deep/p.jsonl --report page.html",
        "$ head -n 4 deep/p.jsonl > half.jsonl; head -c 20 deep/p.jsonl > other.jsonl",
        f"{JUDGE} --pairs DATA/world/test_broken.jsonl --out half.jsonl --json",
        f"{JUDGE} --pairs DATA/world/test_id.jsonl --out deep/p.jsonl",
        f"{JUDGE} --pairs DATA/world/test_broken.jsonl --out half.jsonl --seed 3 --temperature 0.5"],
    "infer-labels": [
        f"{JUDGE} --pairs DATA/lists/videoalign.csv --root DATA/world --label VQ --max-tokens 500 --workers 1",
        f"{JUDGE} --pairs DATA/lists/videoalign.csv --root DATA/world --cot off --out p.jsonl",
        f"{JUDGE} --pairs DATA/lists/videoalign.csv --root DATA/world --samples 2 --think-tokens 900"],
    "infer-instruction": [
        f"{JUDGE} --pairs DATA/world/problems.jsonl --instruction problem --report page.html",
        f"{JUDGE} --pairs DATA/world/problems.jsonl --instruction DATA/ask.txt --out p.jsonl",
        f"{JUDGE} --pairs DATA/world/problems.jsonl --instruction DATA/reward.py"],
    "infer-release": [
        f"{JUDGE} --pairs DATA/world/test_broken.jsonl --scoring-layout release --out p.jsonl",
        f"{JUDGE} {ONE} {TWO} {PROMPT} --scoring-layout release --samples 2 --json",
        f"{JUDGE} {ONE} {TWO} {PROMPT} --scoring-layout release --cot off",
        f"infer.py --model DATA/actor {ONE} {TWO} {PROMPT} --max-new-tokens 15 --report page.html",
        f"infer.py --model DATA/actor --pairs DATA/world/test_broken.jsonl --max-new-tokens 9 --out actor.jsonl",
        f"infer.py --model DATA/actor {ONE} {PROMPT} --max-new-tokens 15 --scoring-layout ours"],
    "infer-models": [
        f"infer.py {ONE} {PROMPT} --max-new-tokens 9", "$ mkdir -p runs; cp -r DATA/model runs/coldstart",
        f"infer.py {ONE} {PROMPT} --max-new-tokens 9", f"infer.py --model DATA/backbone {ONE} {PROMPT}",
        f"infer.py --model DATA/other {ONE} {TWO} {PROMPT} --max-new-tokens 30 --json",
        f"infer.py --model ../rl/run {ONE} {PROMPT} --max-new-tokens 30",
        f"infer.py --model ../rl-whole/run {ONE} {PROMPT} --max-new-tokens 30"],
    "infer-ranks": [f"ranks=2 {JUDGE} --pairs DATA/world/test_broken.jsonl --out p.jsonl --samples 2",
                    f"ranks=2 {PROBE} --limit 3 --samples 1", f"ranks=2 {PAIRS}"],
    # ---- what stands around
    "annotate-model": [
        f"{ANNOTATE} --model DATA/backbone --max-new-tokens 120 --temperature 0.7 --seed 4 --scores",
        f"{ANNOTATE} --model DATA/backbone --max-new-tokens 8 --scores",
        f"-m support.annotate DATA/world/test_broken.jsonl broken.jsonl {MODEL} --max-new-tokens 100 --temperature 0 "
        "--think-tokens 500 --fps 1 --min-pixels 9000 --max-pixels 20000 --instruction DATA/ask.txt",
        f"-m support.annotate DATA/world/test_id.jsonl decord.jsonl {MODEL} --max-new-tokens 60 --max-tokens 500 "
        "--reader decord"],
    "annotate-api": [
        "endpoint plain &",
        f"JUDGE_KEY=secret {ANNOTATE} {API} --api-key-env JUDGE_KEY --scores --max-new-tokens 77 --temperature 0.4",
        f"OPENAI_API_KEY=own -m support.annotate DATA/world/test_broken.jsonl two.jsonl {API} --parallel 2 --fps 1 "
        "--min-pixels 9000 --max-pixels 20000 --instruction DATA/ask.txt --reader decord",
        f"-m support.annotate DATA/world/test_broken.jsonl two.jsonl {API} --fps 1 --min-pixels 9000 "
        "--max-pixels 20000 --instruction DATA/ask.txt --reader decord"],
    "annotate-alone": ["endpoint plain &", f"{ANNOTATE} {API} --parallel 1"],
    "annotate-together": [
        "endpoint together &", f"{ANNOTATE} {API} --scores --together --seed 6",
        f"-m support.annotate DATA/world/test_broken.jsonl two.jsonl {API} --scores --together --instruction "
        "DATA/together.txt", "-m support.filter out.jsonl filtered.jsonl"],
    "annotate-breaks": [
        "endpoint breaks &", f"{ANNOTATE} {API} --parallel 1 --retries 0",
        f"{ANNOTATE} {API} --parallel 1 --temperature 0.5", f"{ANNOTATE} {API} --parallel 1 --retries 1"],
    "annotate-slow": ["endpoint slow &", f"{ANNOTATE} {API} --parallel 1 --retries 0 --timeout 0.4"],
    "filter": [
        "-m support.filter DATA/world/train_cots.jsonl cots.jsonl", "-m support.filter DATA/world/train.jsonl s.jsonl",
        "-m support.filter DATA/other.jsonl other.jsonl --model DATA/other", "-m support.filter DATA/other.jsonl o.jsonl",
        "-m support.filter DATA/lists/stage1.csv missing.jsonl"],
    "check": [
        "-m support.check DATA/lists/videoalign.csv --root DATA/world --label VQ --fps 1 --min-pixels 9000 "
        "--max-pixels 20000", "-m support.check DATA/world/broken.jsonl --reader decord --min-pixels 4096",
        "-m support.check DATA/world/test_id.jsonl --model DATA/actor/huggingface --max-pixels 3000 --min-pixels 256"],
    "convert": [f"-m support.convert DATA/lists/{kind}.csv out/{kind}.jsonl --root DATA/world"
                for kind in ("videoalign", "genai", "stage1", "stage2", "evaluation")] + [
        "-m support.convert DATA/lists/videoalign.csv out/vq.jsonl --root DATA/world --label VQ",
        "-m support.convert DATA/world/broken.jsonl out/broken.jsonl"],
    "pairs": [
        f"{PAIRS} --take all --samples 3 --seed 2 --scores", f"{PAIRS} --take all --samples 3 --seed 2 --margin 0.4",
        f"{PAIRS} --samples 3", "$ rm *.judged", f"{PAIRS} --temperature 0.6 --instruction DATA/ask.txt --workers 1",
        "$ rm *.judged", f"{PAIRS} --repetition-penalty 1.4 --think-tokens 300 --reader decord --margin 9"],
    "probe": [
        f"{PROBE} --limit 3 --samples 2 --seed 3", f"{PROBE} --json --samples 1 --temperature 0.7 --think-tokens 400",
        f"-m support.probe DATA/lists/videoalign.csv --root DATA/world --label VQ {MODEL} --samples 1 "
        "--max-new-tokens 110 --instruction DATA/ask.txt --reader decord",
        f"-m support.probe DATA/world/problems.jsonl {MODEL} --instruction problem --limit 2 --max-new-tokens 60",
        f"-m support.probe DATA/world/test_broken.jsonl --model DATA/actor --samples 2 --max-new-tokens 9 --limit 4"],
    "report": [
        "$ cp -r ../rl-schedule/run rl; cp -r ../coldstart/run cold", "-m support.report rl",
        "-m support.report cold --out pages/cold.html --workers 1 --reader decord", "-m support.report rl --png figures",
        "-m support.report DATA"],
    "serve": [
        f"{SERVE} --videos DATA/world --fps 4 --unusable -1 --window 0.3 --device cpu --host localhost &",
        "api ask $URL", "api ask_files $URL", "api client $URL", "api adapters $URL"],
    "serve-thoughts": [f"{SERVE} --samples 2 --temperature 0.7 --seed 5 --think-tokens 90 --reader decord &",
                       "api client $URL"],
    "serve-scores": [f"{SERVE} --cot off &", "api client $URL", "api ask_files $URL"],
    "serve-limits": [f"{SERVE} --queue 1 --max-body 300000 --max-frames 10 --videos DATA/world &",
                     "api ask_files $URL", "api ask_busy $URL"],
    "serve-pixels": [f"{SERVE} --max-pixels 4000 --max-new-tokens 5 --videos DATA/world &",
                     "api ask_files $URL"],
    "api": ["api judge", "api reward", "api scorer"],
    # ---- what is refused
    "errors": [
        f"{COLD} --batch-size 0", f"{COLD} --mask-p 1.5", f"{COLD} --instruction problem", f"{COLD} --shard full",
        f"{COLD} --train DATA/world/train.jsonl", f"{COLD} --train DATA/world/none.jsonl", f"{COLD} --nothing",
        f"{COLD} --lora-rank 0 --quant 4bit", f"{COLD} {TEST} DATA/lists/../world/test_id.jsonl",
        f"{COLD} --preset DATA/none.json", "coldstart.py --train DATA/world/train_cots.jsonl --out run",
        f"{RL} --length-low 50", f"{RL} --reward DATA/reward.py:none=1", f"{RL} --reward DATA/reward.py:vowels",
        f"{RL} --reward DATA/reward.py:fails=1", f"{RL} --top-p 0", f"{RL} --lora-rank 8", f"{RL} --log wandb",
        f"{RL} --train DATA/lists/stage1.csv --root DATA/world", f"{RL} --model DATA/none",
        f"infer.py {ONE}", f"infer.py {ONE} {TWO}", f"{JUDGE} --out p.jsonl {ONE} {PROMPT}", f"{JUDGE} --samples 0",
        f"{JUDGE} {ONE} {PROMPT} --repetition-penalty 1.2 --temperature 1", f"{JUDGE} {ONE} {PROMPT} --report p.txt",
        f"{ANNOTATE}", f"{ANNOTATE} --model DATA/model --together", f"{ANNOTATE} --api http://x/v1",
        "-m support.annotate DATA/world/test_id.jsonl DATA/world/test_id.jsonl --model DATA/model",
        "-m support.filter DATA/none.jsonl out.jsonl", "-m support.convert DATA/reward.py out.jsonl",
        "-m support.check DATA/lists/videoalign.csv --label XX", "-m support.report DATA --out page.txt",
        "-m support.pairs DATA/world/test_id.jsonl out.jsonl --model DATA/model",
        "-m support.probe DATA/none.jsonl --model DATA/model", "-m support.serve --videos DATA/none",
        "-m support.serve --model DATA/none --port 0"],
}
COMMANDS = ["coldstart.py", "rl.py", "infer.py",
            *(f"-m support.{name}" for name in ("annotate", "filter", "check", "convert", "pairs", "probe", "report",
                                                "serve"))]
CASES["help"] = [f"{command} --help" for command in COMMANDS]
DATA = "../../data"  # from a case's folder

# ------------------------------
# What cases call by name: "api NAME …" runs api_NAME in a tree, "endpoint KIND" what stands for an OpenAI API


def show(value) -> None:
    print(json.dumps(value, default=str), flush=True)


def frames(path: str):
    """All frames of a video, (T, H, W, 3) uint8."""
    import av
    import numpy as np
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def videos() -> tuple[list[str], list[str]]:
    names = ["test_id_00000_a", "test_id_00000_b", "cut", "test_ood_00001_a"]
    return [f"{DATA}/world/videos/{name}.mp4" for name in names], ["A red circle moves left.", "A blue cross."] * 2


def api_judge() -> None:
    from infer import judge
    from model import DeScore
    model = DeScore.load(f"{DATA}/model")
    keys = list(zip(*videos()))
    for options in ({}, {"temperature": 0.7, "seed": 3, "samples": 2}, {"think": False}, {"without_cot": True},
                    {"think_tokens": 80, "done": keys[:1], "repetition_penalty": 1.2},
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
    scorer = Scorer(f"{DATA}/model", "cpu", window=0.2, reader="decord")
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
    paths, prompts = videos()
    show(client([*paths, "none.mp4"], "A red circle moves left."))
    array = frames(paths[1])
    show(client(array / 255, prompts[1], fps=8))
    show(client([array.transpose(3, 0, 1, 2)], prompts, fps=[4], layout="CTHW") if len(prompts) == 1 else "")


def api_adapters(url: str) -> None:
    import torch
    from support.adapters import FlowFactory, VideoAlign, VideoXFun, compute_score_descore, flow_grpo
    from support.client import Client
    score = Client(url, parallel=1)
    paths, prompts = videos()
    paths, prompts = paths[:2], prompts[:2]
    clips = torch.stack([torch.from_numpy(frames(path)) for path in paths]).permute(0, 1, 4, 2, 3) / 255
    show(flow_grpo(score, fps=4)("cpu")(clips, prompts, {}))
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


def api_ask(url: str) -> None:
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


def api_ask_files(url: str) -> None:
    paths, prompts = videos()
    turns = []
    for path, prompt in zip(paths, prompts):
        turns.append({"text": prompt, "video_path": path.removeprefix(f"{DATA}/world/")})
        turns.append({"text": prompt, "video_b64": base64.b64encode(Path(path).read_bytes()).decode()})
    turns += [{"text": "outside", "video_path": "../model/descore.json"}, {"text": "neither"}]
    for turn in turns:
        asked = [{"history": [turn], "required_rewards": ["descore"], "request_id": 7}]
        show(request(url + "/score", {"requests": asked}))
    show(request(url + "/compute", {"prompt": prompts[:1], "video": [pngs(paths[0])], "fps": 4}))
    show(request(url + "/compute", {"prompt": prompts[:1], "video": [pngs(paths[0], 300)[:3] * 3], "fps": 4}))
    show(request(url + "/score", {"requests": [{"history": turns[:1], "required_rewards": ["other"]}]}))


def api_ask_busy(url: str) -> None:
    """While the body of one request does not come, there is no room for another."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as waiting:
        waiting.sendall(b"POST /compute HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n\r\n{")
        while request(url + "/health")[1]["under_way"] == 0:
            time.sleep(0.01)
        show(request(url + "/compute", {"prompt": [], "video": []}))


def endpoint(kind: str) -> None:
    """Answers chat completions by the digest of what is asked, and says at its end what was asked. Of its kinds
    `plain` and `together` answer, `breaks` fails at every fifth request, `slow` is not quick enough."""
    asked, under_way, most, numbers = [], [0], [0], count(1)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
            body = self.rfile.read(int(self.headers["content-length"]))
            record = json.loads(body)
            content = record.pop("messages")[0]["content"]
            about = hashlib.sha256(json.dumps(content).encode()).hexdigest()
            asked.append(json.dumps([self.path, self.headers["authorization"], record, len(content), about]))
            time.sleep(2 if kind == "slow" else 0.1)
            status = 503 if kind == "breaks" and next(numbers) % 5 == 0 else 200
            text = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer(about)}}]})
            under_way[0] -= 1
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments) -> None:
            pass

    def answer(about: str) -> str:
        draw = random.Random(about)
        if kind == "together":
            found = {}
            for video in ("video_1", "video_2"):
                found[f"{video}_scores"] = {name: draw.choice([0, 1, 2, "N/A"]) for name in NAMES}
                found[f"{video}_overall"] = draw.randint(10, 50) / 10
            return f"<think>both</think><answer>{json.dumps(found)}</answer>"
        return "no scores" if draw.random() < 0.1 else cot({name: draw.choice([0, 1, 2]) for name in NAMES}, about[:9])

    def end(number, frame) -> None:
        print("\n".join(sorted(asked)), "\nat a time:", "one" if most[0] < 2 else "several", flush=True)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


# ------------------------------
# Inputs, made once by OLD

NAMES = ("subject", "dynamics", "camera", "environment", "style")
REWARDS = '''"""Rewards of a user's own."""


def vowels(text, n_tokens, gold, args):
    return sum(letter in "aeiou" for letter in text) / (1 + n_tokens + args.seed) + len(str(gold)) / 1000


def quality_reward(text, n_tokens, gold, processor):
    return len(processor.encode(text)) / 100 - gold.get("camera", 0) if gold.get("camera") != "N/A" else 0.5


def format_reward(text, n_tokens, gold):
    return n_tokens % 2


def fails(text, n_tokens, gold):
    raise ValueError("it fails")
'''
ASK = "Watch this: <video> It was asked for by: <prompt> Does it follow? Judge subject, dynamics, camera, style."
OWN = {"preset": "base.json", "coldstart": {"head_lr": 0.05, "epochs": 1, "label": None}, "rl": {"steps": 2}}
BASE = {name: {"model": f"{DATA}/{model}", "out": "run", "batch-size": 4, "lora_rank": 4, "min_pixels": 4096,
               "max_pixels": 4096, "max_new_tokens": 20, "workers": 0, "lr": 0.001, "eval_before": False} | more
        for name, model, more in (("coldstart", "backbone", {"epochs": 2}),
                                  ("rl", "model", {"updates": 1, "group_size": 3, "dual_clip": None, "reward": []}))}


def cot(scores: dict, seen: str, think: str = "think", verdict: str = "answer") -> str:
    """A CoT that gives these sub-scores, in the thought too."""
    lines = [f"{name}: asked for and seen, so {score}" for name, score in scores.items()]
    answer_text = json.dumps({"dimensional_scores": scores, "overall_score": 3.4})
    return f"<{think}>\n{seen}\n" + "\n".join(lines) + f"\n</{think}>\n<{verdict}>\n{answer_text}\n</{verdict}>"


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_csv(path: Path, records: list[dict]) -> None:
    import csv
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def make_inputs(old: Path, work: Path) -> None:
    """Pair files of each kind, broken videos, instructions, presets, a trained model, one of the authors' layout."""
    data, world = work / "data", work / "data/world"
    (data / "lists").mkdir(parents=True)
    make = ["$ true", "toy/world.py ../../data/world --pairs 12 --test-pairs 4 --seed 3"]
    run_lines(old, make, work / "old/inputs")
    shutil.copytree(old / "toy/backbone", data / "backbone")
    clips = world / "videos"
    clip = (clips / "train_00003_a.mp4").read_bytes()
    (clips / "cut.mp4").write_bytes(clip[: len(clip) // 2])
    (clips / "empty.mp4").touch()
    train = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    tests = [json.loads(line) for line in (world / "test_id.jsonl").read_text().splitlines()]
    for number, pair in enumerate(train):
        for side in "ab":
            pair[f"cot_{side}"] = cot(pair[f"scores_{side}"], "seen " * (number % 4 + 3 * (side == "b")))
    write_lines(world / "train_cots.jsonl", train)
    for name, pairs in (("broken", train), ("test_broken", tests)):
        bad = [dict(pair) for pair in pairs]
        bad[0]["video_b"] = "videos/cut.mp4"
        bad[2]["video_a"] = "videos/empty.mp4"
        bad[-1]["video_a"] = "videos/missing.mp4"
        write_lines(world / f"{name}.jsonl", bad)
    write_lines(world / "problems.jsonl", [pair | {"problem": f"Is <video> like {pair['prompt']!r}? Think, then JSON."}
                                           for pair in tests])
    other = {"<think>": "<reason>", "</think>": "</reason>", "<answer>": "<verdict>", "</answer>": "</verdict>"}
    for pair in train:
        for side in "ab":
            for ours, theirs in other.items():
                pair[f"cot_{side}"] = pair[f"cot_{side}"].replace(ours, theirs).replace("style", "taste")
    write_lines(data / "other.jsonl", [pair | {f"video_{s}": f"world/{pair[f'video_{s}']}" for s in "ab"}
                                       | {f"scores_{s}": None for s in "ab"} for pair in train])
    write_tables(data / "lists", world)
    write_lines(data / "groups.jsonl", [
        {"prompt": pair["prompt"], "models": [pair["model_a"], None, "third"],
         "videos": [f"world/{pair['video_a']}", f"world/{pair['video_b']}", f"world/videos/{third}.mp4"]}
        for pair, third in zip(tests, ("cut", "test_ood_00001_a", "train_00001_b", "train_00002_b"))])
    together = (old / "presets/together.txt").read_text()
    for name, text in (("ask.txt", ASK), ("reward.py", REWARDS), ("together.txt", "Two videos.\n" + together),
                       ("own.json", json.dumps(OWN)), ("base.json", json.dumps(BASE))):
        (data / name).write_text(text)
    make = f"{COLD} {TEST} --lr 3e-3 --head-lr 0.1 --max-new-tokens 120 --out DATA/model"
    run_lines(old, ["$ true", "$ true", make], work / "old/inputs")
    shutil.copytree(data / "model", data / "other")
    path = data / "other/model/descore.json"
    changed = {"dimensions": {"subject": 3, "dynamics": 1, "camera": 1, "environment": 1, "taste": 2},
               "tags": ["reason", "verdict"], "instruction": ASK}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    make_actor(data)


def write_tables(lists: Path, world: Path) -> None:
    """The same pairs as CSV files of each kind; in that of VideoAlign the labels of two columns differ."""
    tests = [json.loads(line) for line in (world / "test_ood.jsonl").read_text().splitlines()]
    train = [json.loads(line) for line in (world / "train_cots.jsonl").read_text().splitlines()]
    other = {"A": "B", "B": "A", "tie": "A"}
    votes = {"A": "leftvote", "B": "rightvote", "tie": "tievote"}
    write_csv(lists / "videoalign.csv", [
        {"path_A": pair["video_a"], "path_B": pair["video_b"], "prompt": pair["prompt"], "A_model": pair["model_a"],
         "B_model": pair["model_b"], "VQ": other[pair["preference"]], "MQ": "invalid" if number == 1 else "same",
         "TA": pair["preference"].replace("tie", "same"), "Overall": "A"} for number, pair in enumerate(tests)])
    write_csv(lists / "genai.csv", [
        {"left_video": pair["video_a"], "right_video": pair["video_b"], "prompt": pair["prompt"],
         "left_model": pair["model_a"], "right_model": pair["model_b"],
         "vote_type": votes[pair["preference"]]} for pair in tests])
    shared = [{"videos": str([pair["video_a"], pair["video_b"]]), "prompt": pair["prompt"]} for pair in train]
    answers = []
    for pair in train:
        answer = {"gsb_result": "Video 1 is better." if pair["preference"] == "A" else "Video 2 is better"}
        answers.append(json.dumps(answer | {"video_1_scores": pair["scores_a"], "video_2_scores": pair["scores_b"]}))
    write_csv(lists / "stage1.csv", [
        row | {"GSB": pair["preference"].replace("tie", "same"), "CoT_A": pair["cot_a"], "CoT_B": pair["cot_b"]}
        for row, pair in zip(shared, train)])
    write_csv(lists / "stage2.csv", [row | {"answer": f"<answer>{answer}</answer>"}
                                     for row, answer in zip(shared, answers)])
    write_csv(lists / "evaluation.csv", [
        {"video_A": pair["video_a"], "video_B": pair["video_b"], "prompt": pair["prompt"], "answer": answer}
        for pair, answer in zip(train, answers)])


def make_actor(data: Path) -> None:
    """What the authors' stage 2 leaves: the backbone with a row <Reward>, and rm_head.pth above it."""
    import torch
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
    torch.manual_seed(5)
    tokenizer = AutoTokenizer.from_pretrained(data / "backbone")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<Reward>"]})
    qwen = Qwen3VLForConditionalGeneration.from_pretrained(data / "backbone", dtype=torch.float32)
    qwen.resize_token_embeddings(len(tokenizer))
    qwen.get_input_embeddings().weight.data[-1].normal_(std=0.05)
    for part in (tokenizer, qwen):
        part.save_pretrained(data / "actor/huggingface")
    head = torch.randn(1, qwen.config.text_config.hidden_size)
    torch.save({"model": {"rm_head.weight": head}}, data / "actor/rm_head.pth")


# ------------------------------
# Running a case


def body(tree: Path, words: list[str], folder: Path, name: str, env: dict, signals: dict[str, int]) -> None:
    """What a started process does: what `python WORDS` would do in the folder."""
    os.chdir(folder)
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{end}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(env, PYTHONPATH=str(tree))
    sys.path[:] = [str(tree), *(path for path in sys.path[1:])]

    def watch(event: str, arguments: tuple) -> None:
        if event == "os.rename" and (number := signals.pop(Path(str(arguments[1])).name, None)):
            os.kill(os.getpid(), number)

    if signals:
        sys.addaudithook(watch)
    if words[0] == "api":
        globals()[f"api_{words[1]}"](*words[2:])
    elif words[0] == "endpoint":
        endpoint(words[1])
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [str(tree / words[0]), *words[1:]]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


def run_lines(tree: Path, lines: list[str], folder: Path) -> None:
    """Run a case's commands. Of each its number, with .out, .err and .exit, is the name of what it leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    running, url = [], ""
    for number, line in enumerate(lines, 1):
        words = shlex.split(line.replace("DATA/", f"{DATA}/").replace("$URL", url))
        words = [DATA if word == "DATA" else word for word in words]
        if words[0] == "$":
            shell = line[1:].replace("DATA/", f"{DATA}/")
            subprocess.run(shell, shell=True, cwd=folder, check=True)
            continue
        if words[0] == "like":
            differences = [*compare_folders(folder / words[1], folder / words[2], logs=False)]
            (folder / f"{number}.like").write_text("\n".join(map(str, differences)))
            continue
        ranks, signals, env = 0, {}, {}
        while match := re.fullmatch(r"(\w+)=(\S+)", words[0]):
            words = words[1:]
            if match[1] == "ranks":
                ranks = int(match[2])
            elif match[1] in ("die", "stop"):
                signals[match[2]] = signal.SIGKILL if match[1] == "die" else signal.SIGTERM
            else:
                env[match[1]] = match[2]
        stays = words[-1] == "&"
        started = start(tree, words[: -1 if stays else None], folder, str(number), env, ranks, signals)
        if stays:
            running += started
            while not (said := re.search(r"http://\S+", (folder / f"{number}.out").read_text())):
                time.sleep(0.05)
                if not started[0].is_alive():
                    break
            url = said[0] if said else "none"
        else:
            wait(folder, started)
    for process in running:
        process.terminate()
    wait(folder, running)


def start(tree: Path, words: list[str], folder: Path, name: str, env: dict, ranks: int, signals: dict) -> list:
    """The processes of a command."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(max(ranks, 1)):
        own, mine = dict(env), f"{name}-rank{rank}" if rank else name
        if ranks:
            own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        for end in ("out", "err"):
            (folder / f"{mine}.{end}").touch()
        arguments = (tree, words, folder, mine, own, signals if rank == 0 else {})
        started.append(FORK.Process(target=body, args=arguments, name=mine))
        started[-1].start()
    return started


def wait(folder: Path, started: list) -> None:
    """Wait for the end; where one of several ranks dies, the others are killed, as torchrun does."""
    end = time.time() + TIMEOUT
    while any(process.is_alive() for process in started):
        if time.time() > end or (len(started) > 1 and any((process.exitcode or 0) < 0 for process in started)):
            for process in started:
                process.kill()
        started[0].join(0.02)
    killed = len(started) > 1 and any(process.exitcode < 0 for process in started)
    for process in started:
        late = time.time() > end
        (folder / f"{process.name}.exit").write_text("late" if late else str(process.exitcode))
        if killed:  # what they said, and who died first, is a matter of time
            for kind in ("out", "err", "exit"):
                (folder / f"{process.name}.{kind}").write_text("killed")


# ------------------------------
# Comparing what it left


def normalise(text: str) -> str:
    """A text without what two equal runs say differently: places, ports, times, progress bars but the last."""
    text = re.sub(r"(\S*/)?\.?trees/(old|new)\b", "TREE", text)
    text = re.sub(r"\S*/(old|new)/(?=[\w-]+/)", "WORK/", text)
    text = re.sub(r"(127\.0\.0\.1|localhost)(:|', port=)\d+", r"\1:PORT", text)
    text = re.sub(r"Process \S+:|0x[0-9a-f]+|\x1b\[A", "", text)
    lines = []
    for line in text.split("\n"):
        bars = [bar for bar in line.split("\r") if bar.strip()] or [""]
        lines.append(re.sub(r"\|[^|]*\| *(\S+ )\[[^,\]]*,?[^,\]]*", r"\1[", bars[-1]).rstrip())
    return "\n".join(lines)


def plain(value, place: str = ""):
    """What a JSON file holds, without times and digests of code."""
    if isinstance(value, dict):
        kept = {}
        for key, part in value.items():
            is_time = key.startswith("seconds") and isinstance(part, (int, float))
            is_time |= key in ("metrics_bytes", "written", "made")
            is_code = place == "digests" and key.endswith(".py") and not key.startswith("the ")
            if not is_time and not is_code:
                kept[key] = plain(part, key)
        return kept
    if isinstance(value, list):
        return [plain(part) for part in value if not is_times(part)]
    return normalise(value) if isinstance(value, str) else value


def is_times(part) -> bool:
    """Whether this is a curve of times on a page."""
    return isinstance(part, dict) and str(part.get("name", "")).startswith("seconds") and "points" in part


def difference(old, new, place: str = "") -> str | None:
    """Where two values differ first, with both."""
    if type(old) is not type(new):
        return f"{place}: {old!r} | {new!r}"[:300]
    if isinstance(old, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if key not in old or key not in new:
                return f"{place}.{key}: only in {'OLD' if key in old else 'NEW'}"
            if found := difference(old[key], new[key], f"{place}.{key}"):
                return found
        return None if list(old) == list(new) else f"{place}: the order {list(old)} | {list(new)}"[:300]
    if isinstance(old, list):
        for number, (one, other) in enumerate(zip_longest(old, new, fillvalue="(no more)")):
            if found := difference(one, other, f"{place}[{number}]"):
                return found
        return None
    same = old == new or (isinstance(old, float) and math.isnan(old) and math.isnan(new))
    return None if same else f"{place}: {shortened(old, new)}"


def shortened(old, new) -> str:
    """Both, from a little before where they differ."""
    one, other = str(old), str(new)
    first = max(0, len(os.path.commonprefix([one, other])) - 30)
    return f"{one[first : first + 110]!r} | {other[first : first + 110]!r}"


def read(path: Path):
    """A file as something that `difference` compares."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        from safetensors import safe_open
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            return [file.metadata(), {name: [str(t.dtype), list(t.shape), hashlib.sha256(
                t.contiguous().view(-1).view(dtype=getattr(importlib.import_module("torch"), "uint8")).numpy()
                .tobytes()).hexdigest()] for name, t in tensors.items()}]
    if path.suffix == ".png" or "tfevents" in path.name:
        return len(content) > 100
    if path.suffix in (".json", ".jsonl", ".cots", ".judged"):
        lines = content.decode().split("\n") if path.suffix != ".json" else [content.decode()]
        try:
            return [plain(json.loads(line)) for line in lines if line]
        except ValueError:
            return lines
    if path.suffix == ".html":
        page = content.decode()
        parts = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page)
        rest = re.sub(r'(<script type="application/json"[^>]*>).*?</script>', "", page)
        return [normalise(rest), *(plain(json.loads(part)) for part in parts)]
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return hashlib.sha256(content).hexdigest()
    if path.name == "SHA256SUMS":
        return [line for line in text.splitlines() if "state.json" not in line]
    return normalise(text).split("\n")


def files(folder: Path, logs: bool) -> dict[str, Path]:
    """Files of a case by a name that does not depend on the time."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = re.sub(r"tfevents.*", "tfevents", path.relative_to(folder).as_posix())
        if path.is_file() and path.suffix != ".mp4" and not (name.startswith("runs/toy")):
            found[name] = path
    return found


def compare_folders(old: Path, new: Path, logs: bool = True) -> Iterator[tuple[str, str]]:
    """Where two folders differ: the file, and the first difference in it."""
    olds, news = files(old, logs), files(new, logs)
    for name in sorted({**olds, **news}):
        if name not in olds or name not in news:
            yield name, f"only in {'OLD' if name in olds else 'NEW'}"
        elif olds[name].read_bytes() != news[name].read_bytes():
            if found := difference(read(olds[name]), read(news[name])):
                yield name, found


# ------------------------------
# Flags


def flags_of(folder: Path) -> dict[str, dict[str, str | None]]:
    """The flags of each command and their defaults, where the help says them, from OLD's output of "help"."""
    found = {}
    for number, command in enumerate(COMMANDS, 1):
        found[command] = {}
        text = " ".join((folder / f"{number}.out").read_text().split("options:")[1].split())
        for part in re.split(r" (?=--?[a-z])(?<![,] )", text):
            default = re.search(r"\(default: (.*?)\)", part)
            for flag in re.findall(r"(?:^|, )(--[a-z][\w-]*)", part):
                found[command][flag.replace("_", "-")] = default and default[1]
    return found


def uses(line: str) -> tuple[str, list[tuple[str, str]]]:
    """A command, and its flags with their values, the last of each."""
    words = [word for word in shlex.split(line) if word != "&"]
    while re.fullmatch(r"(\w+)=(\S+)", words[0]):
        words = words[1:]
    name = " ".join(words[: 2 if words[0] == "-m" else 1])
    values: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            flag = word
            values[flag] = []
        elif values:
            values[flag].append(word)
    return name, [(flag, " ".join(value)) for flag, value in values.items()]


def forgotten(flags: dict[str, dict[str, str | None]]) -> list[str]:
    """The flags that no case gives a value other than the default."""
    seen = set()
    for case, lines in CASES.items():
        if case not in ("errors", "help"):
            for line in lines:
                name, values = uses(line)
                for flag, value in values:
                    if value.lower() != str(flags.get(name, {}).get(flag)).lower():
                        seen.add((name, flag))
    return [f"{name} {flag}" for name, known in flags.items() for flag in known
            if flag != "--help" and (name, flag) not in seen]


def without(line: str, flag: str) -> str:
    """A command without a flag and its values."""
    return re.sub(rf"(?<= ){flag}( (?!--)('[^']*'|\S+))*", "", line)


# ------------------------------
# The command


def chosen(pattern: str | None) -> list[str]:
    """The cases of a pattern, and before them those that they build on."""
    wanted = [case for case in CASES if fnmatchcase(case, pattern or "*")]
    for case in wanted:
        for needed in re.findall(r"\.\./([\w-]+)/", " ".join(CASES[case])):
            if needed not in wanted:
                wanted.append(needed)
    return [case for case in CASES if case in wanted]


def run_both(trees: dict[str, Path], case: str, work: Path) -> None:
    """Run a case in both trees, side by side."""
    started = []
    for name, tree in trees.items():
        folder = work / name / case
        shutil.rmtree(folder, ignore_errors=True)
        started.append(FORK.Process(target=run_lines, args=(tree, CASES[case], folder)))
        started[-1].start()
    for process in started:
        process.join()


def is_deliberate(case: str, file: str) -> str | None:
    """The reason for which a file of a case differs on purpose."""
    return next((why for cases, where, why in DELIBERATE if fnmatchcase(case, cases) and fnmatchcase(file, where)), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--only", metavar="PATTERN", help="cases by their names")
    parser.add_argument("--list", action="store_true", help="list the cases")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a new folder for inputs and outputs")
    args = parser.parse_args()
    cases = chosen(args.only)
    if args.list:
        print("\n".join(f"{case:24} {len(CASES[case])} commands" for case in cases))
        return
    for name in PRELOADED:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    work = (args.keep or Path(tempfile.mkdtemp(prefix="compare-"))).resolve()
    trees = {"old": work / "trees/old", "new": work / "trees/new"}
    for name, tree in trees.items():
        shutil.rmtree(tree, ignore_errors=True)
        ignored = shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", "*.png", "tests")
        shutil.copytree(getattr(args, name), tree, ignore=ignored)
    if not (work / "data/actor").is_dir():
        print("making inputs", flush=True)
        make_inputs(trees["old"], work)
    run_both(trees, "help", work)
    missed = forgotten(flags_of(work / "old/help"))
    failed = 0
    for case in cases:
        began = time.time()
        run_both(trees, case, work)
        found = list(compare_folders(work / "old" / case, work / "new" / case))
        found += [(path.name, f"the runs differ: {path.read_text()}") for name in trees
                  for path in (work / name / case).glob("*.like") if path.read_text()]
        real = [one for one in found if not is_deliberate(case, one[0])]
        failed += len(real)
        print(f"{case:24} {'differs' if real else 'on purpose' if found else 'same':10} {time.time() - began:5.1f} s",
              flush=True)
        for where, what in found:
            print(f"    {where}: {what} {is_deliberate(case, where) or ''}")
    for flag in missed:
        print(f"flag without a case: {flag}")
    print(f"{len(cases)} cases, {failed} differences, {len(missed)} flags without a case; kept in {work}")
    if not args.keep:
        shutil.rmtree(work)
    sys.exit(bool(failed or missed))


if __name__ == "__main__":
    main()
