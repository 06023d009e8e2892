"""What the probe shows a model in place of a video, and its figures, against a stub whose score is known."""

import json
import math
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, in_layout
from launch import run, run_ranks

from data import DIMENSIONS, Pair, overall_score, parse_cot, read_pairs, read_video
from infer import Thinking, by_key, judge
from model import DeScore, Thoughts
from tools import probe

NAMES = list(DIMENSIONS)


def cot_of(frames):
    """What the stub writes: sub-scores that follow from the brightness of the first frame."""
    light = int(frames[0].double().mean() * 16)
    scores = {name: (0, 1, 2, "N/A")[(light >> 2 * place) % 4] for place, name in enumerate(NAMES)}
    said = "".join(f"{name}: asked this, so 1 thing, so {scores[name]}\n" for name in NAMES)
    return f"<think>\n{said}</think>\n<answer>" + json.dumps({"dimensional_scores": scores}) + "</answer>"


def worth(cot):
    points = {0: 0.0, 1: 1.0, 2: 3.0, "N/A": 0.5}
    return sum(points[value] for value in parse_cot(cot)["dimensional_scores"].values())


def value(frames, seconds, prompt, cot):
    """The stub's score: of the last time stamp, how the light changes, the prompt's length, the CoT."""
    stamp = float(f"{(seconds[-2] + seconds[-1]) / 2:.1f}")
    light = frames[0].double().mean().item() - frames[-1].double().mean().item()
    return 0.5 * stamp + 0.1 * light + 0.01 * len(prompt) + worth(cot)


class Stub:
    """Scores by `value` what stands in a batch, and nothing else."""

    name, has_head = "stub", True

    def __init__(self, processor):
        self.processor, self.info = processor, {}
        self.scoring_settings = processor.settings

    def encode(self, batch):
        return batch

    def seen(self, batch):
        """Frames, seconds and prompt of each row of a batch, read from its ids and patches."""
        settings, start = self.processor.settings, 0
        for ids, mask, grid in zip(batch.input_ids, batch.mask, batch.grid):
            size = int(grid.prod())
            patches = batch.patches[start : start + size]
            start += size
            shape = (int(grid[0]), -1, 3, settings.temporal_patch_size, settings.patch_size**2)
            frames = patches.reshape(shape).permute(0, 3, 2, 1, 4).flatten(0, 1)  # shuffled within
            text = self.processor.tokenizer.decode(ids[mask], clean_up_tokenization_spaces=False)
            stamps = [float(stamp) for stamp in re.findall(r"<(\d+\.\d) seconds>", text)]
            prompt = text.rpartition("<|vision_end|>")[2].partition("\nDoes the video")[0]
            # A pair of frames has one stamp; `value` takes the mean of the last two seconds.
            yield frames, [stamps[-1]] * 2, prompt

    def watch(self, batch):
        return batch

    def think(self, batch, n, max_new_tokens, temperature, seeds):
        cots, scores = [], []
        for (frames, seconds, prompt), seed in zip(self.seen(batch), seeds):
            cot, drawn = cot_of(frames), random.Random(seed)
            cots.append(torch.tensor([[*self.processor.encode(cot), self.processor.eos_id]] * n))
            noise = [temperature * drawn.gauss(0, 2) for _ in range(n)]
            scores.append([value(frames, seconds, prompt, cot) + some for some in noise])
        longest = max(tokens.shape[1] for tokens in cots)
        eos = self.processor.eos_id
        tokens = torch.stack([torch.nn.functional.pad(t, (0, longest - t.shape[1]), value=eos) for t in cots])
        return Thoughts(tokens, torch.ones_like(tokens, dtype=torch.bool), tokens * 0.0, torch.tensor(scores))

    def score(self, batch, cots):
        rows = zip(self.seen(batch), cots)
        return torch.tensor([value(*row, cot) + 100.0 for row, cot in rows])  # on a scale of its own


@pytest.fixture(scope="module")
def processor():
    return DeScore.load(ROOT / "toy/backbone", device="cpu").processor


@pytest.fixture
def pairs(world_dir):
    return read_pairs(world_dir / "test_id.jsonl")


def probed(stub, pairs, others, samples=1, ranks=probe.ALONE):
    keys = [key for pair in pairs for key in pair.videos()]
    thinking = Thinking(400, samples=samples, think_tokens=4000)
    records = by_key(probe.shown(stub, keys, others, thinking, ranks))
    own = {key: record["cot"] for key, record in records.items()}
    cots = probe.exchanged(pairs, own, others, DIMENSIONS, random.Random(0))
    for record in probe.behind(stub, cots, think_tokens=500, ranks=ranks):
        records[record["video"], record["prompt"]] |= record
    return records, cots


def test_each_way_shows_what_it_says(processor, pairs):
    """Against the stub's score of what should be shown, from the files themselves."""
    stub = Stub(processor)
    others = {pair.prompt: following.prompt for pair, following in zip(pairs, pairs[1:] + pairs)}
    records, cots = probed(stub, pairs, others)
    read = {key: read_video(key[0], processor.settings) for key in records}
    partner = {}
    for pair in pairs:
        a, b = pair.videos()
        partner |= {a: b, b: a}
    assert len(records) == 8 and len({round(record["own"], 3) for record in records.values()}) == 8
    for key, record in records.items():
        (frames, seconds), prompt = read[key], key[1]
        backwards, still = frames[list(range(len(frames) - 1, -1, -1))], frames[[0] * len(frames)]
        stranger = cots["cot_other"][key]
        false = worth_of_false(cot_of(frames))
        assert record["cot"] == cot_of(frames) and "error" not in record
        assert stranger in [cot_of(read[other][0]) for other in read if other[1] == others[prompt]]
        wanted = {
            "own": value(frames, seconds, prompt, cot_of(frames)),
            "prompt_other": value(frames, seconds, others[prompt], cot_of(frames)),
            "prompt_empty": value(frames, seconds, "", cot_of(frames)),
            "reversed": value(backwards, seconds, prompt, cot_of(backwards)),
            "first_frame": value(still, seconds, prompt, cot_of(frames)),
            "fps_doubled": value(frames, [s / 2 for s in seconds], prompt, cot_of(frames)),
            "cot_own": 100 + value(frames, seconds, prompt, cot_of(frames)),
            "cot_of_pair": 100 + value(frames, seconds, prompt, cot_of(read[partner[key]][0])),
            "cot_other": 100 + value(frames, seconds, prompt, stranger),
            "scores_false": 100 + value(frames, seconds, prompt, cot_of(frames)) + false,
            "scores_all_2": 100 + value(frames, seconds, prompt, cot_of(frames)) + worth_of_all_2(frames)}
        for name, expected in wanted.items():
            assert record[name] == pytest.approx(expected, abs=1e-4), name


def worth_of_false(cot):
    """By how much the stub's score changes for 0 → 2, 1 → 0, 2 → 0, "N/A" → 1."""
    change = {0: 3.0, 1: -1.0, 2: -3.0, "N/A": 0.5}
    return sum(change[value] for value in parse_cot(cot)["dimensional_scores"].values())


def worth_of_all_2(frames):
    change = {0: 3.0, 1: 2.0, 2: 0.0, "N/A": 0.0}
    return sum(change[value] for value in parse_cot(cot_of(frames))["dimensional_scores"].values())


def test_figures_of_known_scores(processor, pairs):
    """Change, falls, accuracy and spread, from the records, in plain arithmetic."""
    stub = Stub(processor)
    others = {pair.prompt: following.prompt for pair, following in zip(pairs, pairs[1:] + pairs)}
    records, _ = probed(stub, pairs, others, samples=64)
    found = probe.figures(pairs, records, stub, 64)
    rows, own = found["rows"], [record["own"] for record in records.values()]
    middle = sum(own) / len(own)
    std = math.sqrt(sum((x - middle) ** 2 for x in own) / len(own))
    assert found["std"] == pytest.approx(std) and (found["pairs"], found["videos"]) == (4, 8)
    assert set(rows) == set(probe.WORDS)
    for name, row in rows.items():
        base = "cot_own" if name.startswith(("cot_", "scores_")) else "own"
        change = [(record[name] - record[base]) / std for record in records.values()]
        assert row["change"]["mean"] == pytest.approx(sum(change) / 8, abs=1e-9) and row["change"]["n"] == 8
        assert row["falls"]["mean"] == sum(x < -0.001 for x in change) / 8
        right, decided = 0, 0
        for pair in pairs:
            a, b = (records[key][name] for key in pair.videos())
            decided += pair.preference != "tie"
            right += (pair.preference == "A" and a > b) or (pair.preference == "B" and b > a)
        assert row["accuracy"]["mean"] == pytest.approx(right / decided)
        assert row["accuracy"]["n"] == decided
    # The fps enters through the stamps alone.
    assert rows["fps_doubled"]["falls"]["mean"] == 1.0
    assert found["spread"]["mean"] * std == pytest.approx(2, rel=0.15)  # the stub's noise
    low, high = found["spread"]["interval"]
    assert low < found["spread"]["mean"] < high
    stub.info["score_std"] = 2 * std
    halved = probe.figures(pairs, records, stub, 64)
    assert halved["std"] == 2 * std and "the model's own" in halved["std_of"]
    for part in ("mean", "interval"):
        assert halved["rows"]["reversed"]["change"][part] == pytest.approx(
            [x / 2 for x in rows["reversed"]["change"][part]] if part == "interval"
            else rows["reversed"]["change"][part] / 2)
    assert halved["spread"]["mean"] == pytest.approx(found["spread"]["mean"] / 2)
    text = probe.show(found | {"scores_false_in_thought": 8})
    assert f"{rows['reversed']['change']['mean']:+.2f} [" in text and "spread over 64 thoughts" in text


def test_intervals_are_drawn_by_prompt():
    torch.manual_seed(0)
    values = (torch.randn(400).double() + 3).tolist()
    names = [f"prompt {number}" for number in range(400)]
    found = probe.mean(values, names)
    error = torch.tensor(values).std().item() / 20
    assert found["mean"] == pytest.approx(sum(values) / 400) and found["n"] == 400
    ends = (found["mean"] - 1.96 * error, found["mean"] + 1.96 * error)
    assert found["interval"] == pytest.approx(ends, abs=0.2 * error)
    # The same said four times about each prompt is no surer.
    again = probe.mean(values * 4, names * 4)
    assert again["interval"] == pytest.approx(found["interval"]) and again["n"] == 1600
    # Of one prompt nothing is known about others; of none nothing at all.
    for values, names in (([1.0, 2.0], ["p", "p"]), ([], [])):
        found = probe.mean(values, names)
        assert all(math.isnan(end) for end in found["interval"]) and found["n"] == len(values)
    assert math.isnan(found["mean"]) and probe.with_interval(found) == "–"


def test_what_has_no_row_and_ties_have_no_part():
    """Rows that some videos lack are of the others; a tie decides nothing; equal scores are wrong."""
    pairs = [Pair("p", "a", "b", "A"), Pair("q", "c", "d", "tie"), Pair("r", "e", "f", "B")]
    records = {}
    for (video, prompt), own, behind in zip(
            [key for pair in pairs for key in pair.videos()], (2, 1, 5, 4, 3, 3), (1, 2, 5, None, 0, 1)):
        records[video, prompt] = {"prompt": prompt, "own": float(own), "cot_own": float(own)}
        if behind is not None:
            records[video, prompt]["cot_of_pair"] = float(behind)
    rows = probe.figures(pairs, records, SimpleNamespace(info={}), 1)["rows"]
    assert set(rows) == {"own", "cot_own", "cot_of_pair"}
    assert (rows["own"]["accuracy"]["mean"], rows["own"]["accuracy"]["n"]) == (0.5, 2)
    assert (rows["cot_of_pair"]["accuracy"]["mean"], rows["cot_of_pair"]["change"]["n"]) == (0.5, 5)
    assert rows["cot_of_pair"]["falls"]["mean"] == 3 / 5


def test_another_one_is_never_the_same():
    for count in (2, 3, 7):
        items, drawn = [f"{n}" for n in range(count)], set()
        for seed in range(50):
            found = probe.other_of(items, random.Random(seed))
            assert list(found) == items and all(found[item] != item for item in items)
            drawn |= set(found.items())
        assert len(drawn) == count * (count - 1)
    assert probe.other_of(["one"], random.Random(0)) == {}


SAID = """<think>
subject: asked a red circle, seen red yes, so 2 and so 2
 dynamics: asked so 2 things, so 0.
style: so many words, so N/A
subject matters, so 2
camera: all fine
</think>
<answer>```json
{"dimensional_scores": {"subject":2, "dynamics" : 0,"camera": 1, "environment": 2.0, "style": "N/A"},
 "overall_score": 3.7, "subject": "so 2"}
```</answer>"""
FALSE = """<think>
subject: asked a red circle, seen red yes, so 2 and so 0
 dynamics: asked so 2 things, so 2.
style: so many words, so 1
subject matters, so 2
camera: all fine
</think>
<answer>```json
{"dimensional_scores": {"subject":0, "dynamics" : 2,"camera": 0, "environment": 0, "style": 1},
 "overall_score": 2.4, "subject": "so 2"}
```</answer>"""


def test_sub_scores_are_falsified_in_answer_and_thought():
    assert probe.falsified(SAID, probe.FALSE, DIMENSIONS) == FALSE
    wrong = parse_cot(FALSE)["dimensional_scores"]
    assert overall_score(wrong) == pytest.approx(1 + 2 * (2 * 2 + 1) / 7)
    for name, value in parse_cot(SAID)["dimensional_scores"].items():
        assert wrong[name] != value
    praised = probe.falsified(SAID, probe.ALL_2, DIMENSIONS)
    assert list(parse_cot(praised)["dimensional_scores"].values()) == [2, 2, 2, 2, "N/A"]
    assert parse_cot(praised)["overall_score"] == 5.0
    odd = [SAID.replace(": 0,", f": {value},") for value in ("7", "0e1", "-0")]  # two of them scores
    for text in ("", "<answer></answer>", *odd):
        assert probe.falsified(text, probe.FALSE, DIMENSIONS) is None
    odd = {"a.b": 1, "größe \\1": 2}
    answer = json.dumps({"dimensional_scores": {"a.b": 2, "größe \\1": "N/A"}}, ensure_ascii=False)
    cot = f"<think>a.b: so 2\naxb: so 2\n- **größe \\1**: so N/A</think><answer>{answer}</answer>"
    false = probe.falsified(cot, probe.FALSE, odd)
    assert parse_cot(false, odd)["dimensional_scores"] == {"a.b": 0, "größe \\1": 1}
    assert false.startswith("<think>a.b: so 0\naxb: so 2\n- **größe \\1**: so 1</think>")


# ------------------------------------------------------------------------------------------------------------
# With a model


@pytest.mark.parametrize(("layout", "fps"), [
    ("ours", 6.3),  # of which the frames divided by it, times it, is less
    ("release at a size", None),
    *[pytest.param(*each, marks=pytest.mark.slow) for each in (
        ("ours", None), ("release", None), ("release", 6.3), ("release at a size", 6.3))]])
def test_the_score_as_it_is_is_that_of_judge(model, keys, layout, fps):
    """In either layout; read again behind its own CoT it is the same."""
    in_layout(model, layout.split()[0])
    if fps:
        model.processor.settings = replace(model.processor.settings, fps=fps)
    if layout == "release at a size":
        model.info["scoring_video"] = {"min_pixels": 1024, "max_pixels": 1024}
    judged = by_key(judge(model, keys[:2], max_new_tokens=40))
    others = {keys[0][1]: keys[1][1], keys[1][1]: keys[0][1]}
    records, cots = {}, {}
    for record in probe.shown(model, keys[:2], others, Thinking(40)):
        records[record["video"], record["prompt"]] = record
    own = {key: record["cot"] for key, record in records.items()}
    for record in probe.behind(model, {"cot_own": own, "swapped": dict(zip(own, reversed(own.values())))}):
        cots[record["video"], record["prompt"]] = record
    for key in keys[:2]:
        assert records[key]["cot"] == judged[key]["cot"]
        assert records[key]["own"] == pytest.approx(judged[key]["score"], abs=1e-5)
        assert cots[key]["cot_own"] == pytest.approx(judged[key]["score"], abs=1e-5)
        assert abs(cots[key]["swapped"] - cots[key]["cot_own"]) > 1e-4
        for name in ("prompt_other", "prompt_empty", "first_frame", "fps_doubled"):
            assert abs(records[key][name] - records[key]["own"]) > 1e-4, name


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """A model with a head, which a fixed seed has drawn."""
    folder = tmp_path_factory.mktemp("scorer") / "model"
    torch.manual_seed(0)
    model = DeScore.load(ROOT / "toy/backbone", device="cpu")
    model.set_trainable(4)
    model.save(folder)
    return folder


def decided(world_dir, path, count):
    """A file of so many pairs that are no ties, with absolute paths."""
    lines = []
    for line in (world_dir / "train.jsonl").read_text().splitlines():
        pair = json.loads(line)
        if pair["preference"] != "tie" and len(lines) < count:
            lines.append(pair | {name: str(world_dir / pair[name]) for name in ("video_a", "video_b")})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


@pytest.mark.slow
def test_the_command_prints_a_table(world_dir, scorer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    decided(world_dir, path, 2)
    command = ["-m", "tools.probe", path, "--model", scorer, "--samples", 2, "--max-new-tokens", 5]
    short = json.loads(run(*command, "--json").stdout)
    first, second = run_ranks(2, *command, "--json")
    assert second.stdout == "" and flat(json.loads(first.stdout)) == pytest.approx(flat(short), abs=1e-3)
    text = run(*command, "--limit", 1).stdout.splitlines()
    assert text[0] == "2 videos of 1 pairs; changes in standard deviations"
    # With CoTs cut off before any sub-score, and with no other prompt, rows are missing.
    assert [line[:20].strip() for line in text[4:-3]] == [
        "as it is", "thought about once m", "the prompt empty", "the frames in revers",
        "each frame the first", "the seconds halved,", "the CoT its own, rea", "the CoT that of the"]


@pytest.mark.slow
def test_the_table_of_whole_cots_has_every_row(world_dir, scorer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    decided(world_dir, path, 2)
    done = run("-m", "tools.probe", path, "--model", scorer, "--samples", 2, "--max-new-tokens", 140,
               "--json")
    found, pairs = json.loads(done.stdout), read_pairs(path)
    assert found["pairs"] == 2 and found["videos"] == 4 and "2 pairs" in done.stderr
    assert set(found["rows"]) == set(probe.WORDS) and found["spread"]["mean"] > 0
    judged = by_key(judge(DeScore.load(scorer), [key for pair in pairs for key in pair.videos()],
                          max_new_tokens=140))
    right = 0
    for pair in pairs:
        a, b = (judged[key]["score"] for key in pair.videos())
        right += (a > b) == (pair.preference == "A")
    assert found["rows"]["own"]["accuracy"]["mean"] == right / 2
    assert found["rows"]["own"]["change"]["mean"] == 0 == found["rows"]["cot_own"]["change"]["mean"]
    assert found["rows"]["scores_false"]["change"]["n"] == found["scores_false_in_thought"] > 0


def flat(found):
    """All numbers of a report by their path."""
    numbers = {}
    for name, part in found.items():
        if isinstance(part, dict):
            numbers |= {f"{name}/{rest}": value for rest, value in flat(part).items()}
        elif isinstance(part, list):
            numbers |= {f"{name}/{place}": value for place, value in enumerate(part)}
        elif not isinstance(part, str):
            numbers[name] = part
    return numbers


def test_an_unreadable_video_and_a_single_prompt(world_dir, scorer, tmp_path):
    """Pairs of it are left out, listed and counted; with one prompt there is no other."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video" * 100)
    path = tmp_path / "pairs.jsonl"
    lines = [line | {"prompt": "A red circle."} for line in decided(world_dir, path, 3)]
    lines[1]["video_b"] = str(broken)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["-m", "tools.probe", path, "--model", scorer, "--samples", 1, "--max-new-tokens", 5]
    command.append("--json")
    done = run(*command, check=False)
    assert done.returncode == 1 and f"left out: {broken}: not a video" in done.stderr
    found = json.loads(done.stdout)
    assert (found["pairs"], found["videos"], found["unreadable"]) == (2, 4, 1) and "spread" not in found
    assert not {"prompt_other", "cot_other", "again"} & set(found["rows"])
    assert found["rows"]["reversed"]["change"]["interval"] == [None, None]
    path.write_text(json.dumps(lines[1]) + "\n")
    done = run(*command, check=False)
    assert done.returncode == 1 and "error: " in done.stderr and done.stdout == ""
    assert "no pair has two videos that can be read" in done.stderr and "Traceback" not in done.stderr
    done = run("-m", "tools.probe", path, "--model", "toy/backbone", check=False)
    assert done.returncode == 1 and "error: toy/backbone: has no trained" in done.stderr


def test_quoted_sub_scores_are_falsified_too():
    quoted = re.sub(r": (\d)([,}])", r': "\1"\2', SAID)
    assert quoted != SAID and parse_cot(quoted) == parse_cot(SAID)
    false = probe.falsified(quoted, probe.FALSE, DIMENSIONS)
    assert parse_cot(false)["dimensional_scores"] == parse_cot(FALSE)["dimensional_scores"]
