"""What is looked at in a run of tests/flags.py: each function returns what is found, and what is expected,
worked out by hand."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coldstart import order
from support.batches import draw_seed


class Done:
    """A run that has ended: its command, its folder, what it printed, and what it asked of the model."""

    def __init__(self, command: list[str], out: Path, data: dict[str, Any], other: Callable, printed: str,
                 notes: list[dict]):
        self.command, self.out, self.data, self.printed = command, out, data, printed
        self.other = other  # another run by its name
        self.ranks = notes
        self.notes = notes[0]

    def lines(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.out / name).read_text().splitlines()]

    @property
    def steps(self) -> list[dict]:
        return [record for record in self.lines("metrics.jsonl") if "loss" in record]

    @property
    def evaluations(self) -> list[dict]:
        return [record for record in self.lines("metrics.jsonl") if "loss" not in record]

    def files(self, place: str) -> set[str]:
        return {path.name for path in (self.out / place).iterdir()}

    def weights(self, folder: str | Path = "model") -> dict[str, torch.Tensor]:
        """The tensors of a saved model, by name."""
        found = {}
        for path in sorted((self.out / folder).glob("*.safetensors")):
            found |= load_file(path)
        return found

    def moved(self, part: str) -> bool:
        """Whether a weight of the tower with this in its name has another value than the backbone's."""
        before = self.weights(self.data["backbone"])
        for name, weight in self.weights().items():
            name = name[name.find("visual.") :]
            if "visual." in name and part in name:
                (was,) = [other for place, other in before.items() if place.endswith(name)]
                if not torch.equal(weight, was.to(weight.dtype)):
                    return True
        return False


# ------------------------------------------------------------------------------------------------------------
# Looks that both stages share. Each returns what is found, and what is expected


def checkpoints(run):
    return run.files("checkpoints"), {"step-2", "step-3", "step-4"}


def first_evaluation(step):
    return lambda run: (run.evaluations[0]["step"], step)


def evaluated(run):
    return [record["step"] for record in run.evaluations], [3, 4]


def test_sets(run):
    names = {name.split("/")[0] for name in run.evaluations[0]} - {"step"}
    return names, {"test_a", "test_b"}


def eval_temperature(run):
    """What the model was told when it thought about the test sets' videos."""
    held_out = {record["video"] for record in run.lines("held_out.jsonl")}
    calls = [call for call in run.notes["thought"] if {row[0] for row in call["rows"]} & held_out]
    return {call["temperature"] for call in calls}, {0.5}


def longest_thought(expected):
    return lambda run: (max(max(map(max, call["tokens"])) for call in run.notes["thought"]), expected)


def rows_together(expected):
    """The most videos of a test set that were thought about together."""

    def look(run):
        held_out = {record["video"] for record in run.lines("held_out.jsonl")}
        sizes = [len(call["rows"]) for call in run.notes["thought"] if call["rows"][0][0] in held_out]
        return max(sizes), expected

    return look


def held_out(run):
    """Of each of the two test sets the first video, at each of two evaluations."""
    records = run.lines("held_out.jsonl")
    firsts = [pair["video_a"] for pair in run.data["tests"]]
    return [(record["step"], record["video"]) for record in records], [
        (step, video) for step in (3, 4) for video in firsts]


def kept_rollouts(run):
    return [record["step"] for record in run.lines("rollouts.jsonl")], [1, 2, 3, 4]


def order_of_5(run):
    """Which pairs the steps took, by the first call of each."""
    calls = run.notes["scored"] if run.command[0] == "coldstart.py" else run.notes["grouped"]
    seen = [{row[0] for row in call["rows"]} for call in calls if len(call["rows"]) == 2]
    numbers = [run.data["whose"][min(videos)] for videos in seen if min(videos) in run.data["whose"]]
    numbers = list(dict.fromkeys(numbers))  # stage 2 reads a pair more than once
    wanted = order(4, 1, seed=5)
    assert wanted != order(4, 1, seed=0)
    return numbers, wanted


def recomputed(is_so):
    return lambda run: (run.notes["recomputed"] > 0, is_so)


def grids(*wanted):
    """How many patches each video of the training pairs had: in time, down, across."""

    def look(run):
        found = {tuple(grid) for call in run.notes["seen"] for grid in call["grid"]}
        return {grid for grid in found if grid != (1, 2, 2)}, set(wanted)  # what stands in for a long prompt

    return look


def asked(run):
    """All prompts have the instruction's words."""
    texts = [call["text"] for call in run.notes["seen"]]
    return {("Watch this: " in text, "It was asked for by: " in text) for text in texts}, {(True, True)}


def left_out(run):
    """The pairs of which a prompt is longer than --max-prompt allows."""
    found = {tuple(sorted(record["videos"])) for record in run.lines("skipped.jsonl")}
    wanted = {videos for videos, length in run.data["lengths"].items() if length > run.data["max_prompt"]}
    assert 0 < len(wanted) < 4
    return found, wanted


def accuracy_by_the_column(run):
    """The accuracy by hand, of the scores in held_out.jsonl and the column that was named."""
    records = {record["video"]: record for record in run.lines("held_out.jsonl")}
    return run.evaluations[-1]["test/accuracy"], pytest.approx(share_right(run, records))


def began_with(run):
    """At a rate of 0 the model that comes out is the one that went in."""
    before = {}
    for path in (run.data["data"] / "model").glob("*.safetensors"):
        before |= load_file(path)
    after = run.weights()
    return {name for name, weight in before.items() if torch.equal(after[name], weight)}, set(before)


def loaded(run):
    return [loaded["model"] for loaded in run.notes["loaded"]], [str(run.data["data"] / "model")]


def one_worker(run):
    return set(run.notes["loaders"]), {1}


def scored_together(rows):
    return lambda run: ({len(call["rows"]) for call in run.notes["scored"]}, {rows})


def all_pairs(run):
    calls = run.notes["scored"] if run.command[0] == "coldstart.py" else run.notes["grouped"]
    return {row[0] for call in calls for row in call["rows"]}, set(run.data["whose"])


def files_of_a_run(run):
    wanted = {"metrics.jsonl", "rollouts.jsonl", "settings.json", "checkpoints", "model"}
    return wanted - run.files("."), set()


def rank_4(run):
    config = json.loads((run.out / "model/adapter_config.json").read_text())
    ranks = {len(weight) for name, weight in run.weights().items() if "lora_A" in name}
    return (config["r"], ranks), (4, {4})


def no_adapter(run):
    names = run.weights()
    return any("lora" in name for name in names), False


def moved(part, is_so):
    """Whether the part of the tower with this name has moved."""
    return lambda run: (run.moved(part), is_so)


def eight_bit(run):
    return [made["kind"] for made in run.notes["optimizers"]], ["AdamW8bit"]


def four_bit(run):
    """The queries, keys, values, outputs, gates, ups and downs of all blocks."""
    (loaded,) = run.notes["loaded"]
    return loaded["layers"].get("bitsandbytes Linear4bit", 0), 7 * run.data["blocks"]


def a_part_on_each_rank(run):
    """Two ranks together have all that trains once, but [Reward] and the head, which each has whole; and
    neither has more than six tenths, for rows are cut in two."""
    (first,), (second,) = (notes["optimizers"] for notes in run.ranks)
    own, whole = run.data["own"], first["parameters"]
    largest = max(first["here"], second["here"])
    return (first["here"] + second["here"], largest < 0.6 * whole), (whole + own, True)


def tensorboard(run):
    return len(list(run.out.rglob("events.out.tfevents*"))), 1


# ------------------------------------------------------------------------------------------------------------
# Looks at the commands that judge


def told(field, *expected):
    """What the model was told whenever it thought."""
    return lambda run: ({call[field] for call in run.notes["thought"]}, set(expected))


def by_decord(run):
    return set(run.notes["opened"]), {"decord"}


def penalty(run):
    return {call["repetition_penalty"] for call in run.notes["thought"]}, {1.3}


def in_the_releases(run):
    return judged(run)[0]["layout"], "release"


def recorded(run):
    return set(judged(run)[1]), below_the_root(run)[1]


def json_of(**expected):
    """What is printed is JSON that has this."""
    return lambda run: ({name: json.loads(run.printed)[name] for name in expected}, expected)


def page(run):
    return "<html" in (run.out / "page.html").read_text(), True


def seeds_of_4(videos):
    """The draws of each of so many videos are those of seed 4 and its number."""

    def look(run):
        seeds = {seed for call in run.notes["thought"] for seed in call["seeds"]}
        return seeds, {draw_seed(4, number) for number in range(videos)}

    return look


def videos_together(expected):
    return lambda run: (max(len(call["rows"]) for call in run.notes["thought"]), expected)


def judged(run):
    """The file of judgements: what made them, and the records by video."""
    made_by, *records = run.lines("judged.jsonl")
    return made_by["made_by"], {record["video"]: record for record in records}


def accuracy_printed(run):
    """The accuracy by hand, of the file of judgements and the column that was named."""
    _, records = judged(run)
    return json.loads(run.printed)["accuracy"], pytest.approx(share_right(run, records))


def accuracy_probed(run):
    """The same of the probe: whose a score is, its seed tells, and the first is of the video as it is."""
    by_seed = {draw_seed(4, number): video for number, video in enumerate(run.data["listed"])}
    own = {}
    for call in run.notes["thought"]:
        (seed,), ((score, *_),) = call["seeds"], call["scores"]
        own.setdefault(by_seed[seed], {"score": score})
    return json.loads(run.printed)["rows"]["own"]["accuracy"]["mean"], pytest.approx(share_right(run, own))


def below_the_root(run):
    """The videos that were thought about, but for those that are trained on."""
    videos = {row[0] for call in run.notes["thought"] for row in call["rows"]}
    return videos - set(run.data["whose"]), set(run.data["listed"])


def share_right(run, records):
    right = []
    for row in run.data["rows"]:
        a, b = (records[str(run.data["world"] / row[side])]["score"] for side in ("path_A", "path_B"))
        right.append((a > b) == (row["VQ"] == "A"))
    return fmean(right)


def no_thought(run):
    _, records = judged(run)
    return run.notes["thought"], [] if all("cot" not in record for record in records.values()) else None


def problems(run):
    """The prompt is the pair's problem, and nothing of the model's own instruction."""
    texts = [call["text"] for call in run.notes["seen"]]
    return ("Is this so: " in texts[0], any("Does the video" in text for text in texts)), (True, False)


def converted(run):
    records = run.lines("pairs.jsonl")
    found = [(record["preference"], (run.out / record["video_a"]).resolve()) for record in records]
    return found, [(row["VQ"], run.data["world"] / row["path_A"]) for row in run.data["rows"]]


def in_letters(run):
    """How many tokens a prompt has, by the tokenizer that was named."""
    lengths = run.data["letter_lengths"]
    (line,) = [line for line in run.printed.splitlines() if line.startswith("tokens a sample")]
    return line.split(", ")[0], f"tokens a sample: {min(lengths)} to {max(lengths)}"


def said(text):
    return lambda run: (text in run.printed, True)


def kept_by_its_own_words(run):
    assert run.other("filter-plain").out.joinpath("kept.jsonl").read_text() == ""
    return len(run.lines("kept.jsonl")), len(run.data["lengths"])


def unclipped(run):
    """What would be clipped without the bound is not with it."""
    far = run.other("rl-far").steps[0]
    assert far["clip_fraction"] > 0.02
    return run.steps[0]["clip_fraction"], 0.0


def bounded_kl(run):
    far = run.other("rl-far").steps[0]
    assert far["kl"] > 0.01
    return 0 < run.steps[0]["kl"] <= 1e-5, True


def by_theta(run):
    """−log P(w ≻ l) of decided pairs: log (1 + θ e^(r_l − r_w))."""
    (call,) = run.notes["scored"]
    won, lost = call["scores"][0::2], call["scores"][1::2]
    losses = [math.log1p(2 * math.exp(r_l - r_w)) for r_w, r_l in zip(won, lost)]
    return run.steps[0]["loss"], pytest.approx(fmean(losses), rel=1e-4)
