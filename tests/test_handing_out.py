"""Ranks that judge take groups one by one, the longest first; a killed one costs what it was at."""

import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from conftest import ROOT
from launch import Started, run
from test_adapters import save_scorer
from test_runs import Threads, torchrun

import infer
from support.batches import deal_to_all


class Two(Threads):
    """Two ranks in one process, which see one store."""

    def __init__(self, rank, lists, barrier, store):
        super().__init__(rank, lists, barrier)
        object.__setattr__(self, "store", store)


def on_two(work):
    """What hand_out yields for six numbers on each of two ranks. work(rank, number) makes a list."""
    store, lists, barrier = dist.HashStore(), [[], []], threading.Barrier(2)

    def rank(place):
        ranks = Two(place, lists, barrier, store)
        found = ranks.hand_out(6, lambda numbers: (work(place, number) for number in numbers))
        return list(found)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(rank, range(2)))


def test_whoever_is_free_takes_the_next_number():
    did, begun, others_done = ([], []), threading.Event(), threading.Event()

    def work(rank, number):
        if rank == 1:  # at its first for as long as the other is at all others
            begun.set()
            assert others_done.wait(20)
            time.sleep(0.3)  # and then until the first rank has nothing more to do
        assert begun.wait(20)
        did[rank].append(number)
        if len(did[0]) == 5:
            others_done.set()
        return [number, -number]

    first, second = on_two(work)
    assert len(did[0]) == 5 and len(did[1]) == 1 and sorted(did[0] + did[1]) == [*range(6)]
    assert did[0] == sorted(did[0])  # in their order
    assert Counter(first) == Counter(second) == Counter([*range(6), *range(0, -6, -1)])


def test_the_first_rank_has_what_others_made_before_they_end():
    done, begun, turn = [], threading.Event(), threading.Event()

    def work(rank, number):
        if rank == 0:
            begun.set()
            assert turn.wait(20)
        else:
            assert begun.wait(20)
            if len(done) == 2:  # by now two lists of its own stand in the store
                turn.set()
            done.append(number)
        return [[rank, number]]

    first, _ = on_two(work)
    assert [rank for rank, _ in first[:3]] == [0, 1, 1] and [n for _, n in first[1:3]] == done[:2]


def test_the_longest_are_handed_out_first_and_nothing_twice():
    sizes = [5, 9, 1, 7, 7, 2, 8, 3, 6, 4, 1]
    items = [f"item {i}" for i in range(len(sizes))]
    size_of = dict(zip(items, sizes))
    for world, budget in ((1, 18), (2, 18), (3, 9), (4, 1000), (40, 9)):
        groups = deal_to_all(items, sizes, budget, world)
        widest = [max(size_of[item] for item in group) for group in groups]
        assert widest == sorted(widest, reverse=True)
        assert all(len(group) * wide <= budget for group, wide in zip(groups, widest))
        assert sorted(item for group in groups for item in group) == sorted(items)
        assert len(groups) >= min(world, len(items))  # there is work for each


@pytest.mark.parametrize("count, of_first", [(2, 1), (4, 2), (8, 4)])
def test_workers_leave_other_ranks_their_share(count, of_first, monkeypatch):
    def ahead(processor, groups, workers, order):  # as workers do, before the other rank takes any
        taken = list(islice(order, max(1, 2 * workers)))
        sizes.append(len(taken))
        barrier.wait(20)
        yield from ((None, []) for _ in chain(taken, order))

    def judge(place):
        ranks = Two(place, lists, meet, store)
        model = SimpleNamespace(processor=None)
        keys = [(f"{number}.mp4", "a prompt") for number in range(count)]
        return list(infer.judge(model, keys, think_tokens=1, workers=2, finite=False, ranks=ranks))

    def judged(model, group, *_):
        return [{"video": video, "prompt": prompt} for _, (video, prompt) in group]

    sizes, lists, store = [], [[], []], dist.HashStore()
    meet, barrier = threading.Barrier(2), threading.Barrier(2)
    monkeypatch.setattr(infer, "read_ahead", ahead)
    monkeypatch.setattr(infer, "judge_batch", judged)
    monkeypatch.setattr(infer, "prompt_lengths", lambda processor, keys, ranks: dict.fromkeys(keys, 1))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(judge, range(2)))
    assert sizes == [of_first] * 2 and [len(records) for records in found] == [count] * 2


# Judges as the command does. Rank 1 of the first start dies at its second group, once its first stands in the
# journal; of each start there is a note of what it judged, and of the second what the journal had.
DYING = f"""
import importlib, json, os, shutil, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import infer
from support.command import run_command
from support.ranks import Ranks

folder, command, journal, *sys.argv[1:] = sys.argv[1:]
start, rank = (os.environ[name] for name in ("TORCHELASTIC_RESTART_COUNT", "RANK"))
if start == "1" and rank == "0":
    shutil.copy(journal, folder + "/before")
judge_batch, mine = infer.judge_batch, []

def noted(model, group, *args, **kwargs):
    if (start, rank, len(mine)) == ("0", "1", 1):
        while json.dumps(mine[0][0][1][0]) not in open(journal).read():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    elif (start, rank) == ("0", "0"):
        time.sleep(0.3)  # it leaves some to the other
    with open(folder + "/judged-" + start, "a") as file:
        file.write(json.dumps([key for _, key in group]) + "\\n")
    mine.append(group)
    return judge_batch(model, group, *args, **kwargs)

infer.judge_batch = noted
run_command(importlib.import_module(command).main)
"""


def keys_in(lines):
    return [(record["video"], record["prompt"]) for record in map(json.loads, lines) if "cot" in record]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["infer", "tools.annotate", "tools.pairs"])
def test_a_killed_rank_costs_what_it_was_at(command, world_dir, tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    out = tmp_path / "out.jsonl"
    source, model = world_dir / "train.jsonl", save_scorer(tmp_path / "model")
    flags = ["--model", model, "--max-new-tokens", 8, "--think-tokens", 1]  # a clip at a time
    arguments = {"infer": ["--pairs", source, "--out", out], "tools.annotate": [source, out],
                 "tools.pairs": [tmp_path / "videos.jsonl", out]}[command]
    journal = tmp_path / {"infer": "out.jsonl", "tools.annotate": "out.jsonl.cots",
                          "tools.pairs": "out.jsonl.judged"}[command]
    pairs = [json.loads(line) for line in source.read_text().splitlines()]
    keys = {(str(world_dir / pair[f"video_{side}"]), pair["prompt"]) for pair in pairs for side in "ab"}
    if command == "tools.pairs":
        by_prompt = {}
        for video, prompt in sorted(keys):
            by_prompt.setdefault(prompt, []).append(video)
        lines = [json.dumps({"prompt": prompt, "videos": videos}) + "\n"
                 for prompt, videos in by_prompt.items()]
        (tmp_path / "videos.jsonl").write_text("".join(lines))
    done = Started(*torchrun(2, "--max-restarts", 1, tmp_path / "dying.py", tmp_path, command, journal,
                             *arguments, *flags)).wait(300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on after" in done.stderr
    judged = [[tuple(key) for line in (tmp_path / f"judged-{start}").read_text().splitlines()
               for key in json.loads(line)] for start in (0, 1)]
    before = keys_in((tmp_path / "before").read_text().splitlines())
    assert len(before) >= 2 and set(before) <= set(judged[0])
    assert not set(judged[1]) & set(before) and len(set(judged[1])) == len(judged[1])  # nothing twice
    assert set(judged[1]) | set(before) == keys
    assert len(judged[0]) + len(judged[1]) <= len(keys) + 2 + 2  # what two ranks were at, and had not told
    if command != "tools.annotate":  # whose journal has served
        assert Counter(keys_in(journal.read_text().splitlines())) == Counter(keys)
    alone = tmp_path / "alone.jsonl"
    again = [alone if part == out else part for part in arguments]
    script = {"infer": ["infer.py"]}.get(command, ["-m", command])
    run(*script, *again, *flags)
    found, expected = (sorted(path.read_text().splitlines()[command == "infer" :]) for path in (out, alone))
    for one, other in zip(found, expected, strict=True):
        assert cots_of(one) == cots_of(other)


def cots_of(line):
    return {name: value for name, value in json.loads(line).items() if name.startswith(("cot", "video"))}
