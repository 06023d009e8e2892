"""What is meant to be changed can be changed: dimensions, how it thinks, rewards, what the loss is a mean of.
And the code has the shape that lets a reader find where."""

import argparse
import ast
import json
import math
import re
import shutil
import statistics
from graphlib import TopologicalSorter
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TOY_VIDEO
from launch import run
from transformers import HfArgumentParser

import coldstart
import infer
import rl
from coldstart import order
from data import DataError, make_instruction, read_pairs
from model import DeScore
from support import command
from support.run import summary
from support.settings import load_function, parse_args
from tools import annotate, check

FIVE = [ROOT / f"{name}.py" for name in ("data", "model", "coldstart", "rl", "infer")]
QUICK = [*TOY_VIDEO, "--lora-rank", 4, "--workers", 0, "--no-gradient-checkpointing", "--lr", 1e-3]
DEFAULT = {"subject": 2, "dynamics": 2, "camera": 1, "environment": 1, "style": 1}
THREE = {"object": 2, "motion": 1, "text rendering": 1}
SIX = {"subject": 2, "dynamics": 2, "camera": 1, "environment": 1, "style": 1, "text rendering": 2}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def arguments(world_dir, out, *extra):
    """One step of stage 2 on two pairs, on the backbone as it is."""
    return ["--model", ROOT / "toy/backbone", "--train", world_dir / "train.jsonl", "--out", out,
            "--steps", 1, "--batch-size", 2, "--updates", 1, "--group-size", 4, "--max-new-tokens", 150,
            *QUICK, *extra]


def first_pairs(world_dir, step=1):
    """The two pairs that a step takes."""
    pairs = read_pairs(world_dir / "train.jsonl")
    return [pairs[row] for row in order(len(pairs), 1, seed=0)[2 * step - 2: 2 * step]]


def step_of(out):
    """The only step's figures, all of them finite."""
    (record,) = [record for record in lines(out / "metrics.jsonl") if "loss" in record]
    assert all(value is not None and math.isfinite(value) for value in record.values()), record
    assert record["left_out"] == 0 and record["grad_norm"] > 0
    return record


# ------------------------------------------------------------------------------------------------------------
# Dimensions


def write_pair_file(path, world_dir, dimensions, rows):
    """Pairs with CoTs and reference scores over the dimensions."""
    values = (2, 0, "N/A", 1, 2, 1)
    with path.open("w") as file:
        for pair in read_pairs(world_dir / "train.jsonl")[rows]:
            pair.preference = "A"
            for side, some in (("a", values), ("b", values[::-1])):
                scores = dict(zip(dimensions, some))
                answer = json.dumps({"dimensional_scores": scores})
                setattr(pair, f"scores_{side}", scores)
                setattr(pair, f"cot_{side}", f"<think>text: seen</think><answer>{answer}</answer>")
            file.write(json.dumps(vars(pair)) + "\n")
    return path


def copy_with(dimensions, root):
    """A copy of the project whose dimensions are others, and whose backbone has not settled on any."""
    for path in FIVE:
        shutil.copy(path, root)
    for folder in ("support", "toy/backbone"):
        shutil.copytree(ROOT / folder, root / folder)
    text, count = re.subn(r"(?m)^DIMENSIONS = \{[^}]*\}$", f"DIMENSIONS = {dimensions}",
                          (root / "data.py").read_text())
    assert count == 1
    (root / "data.py").write_text(text)
    saved = json.loads((root / "toy/backbone/descore.json").read_text())
    del saved["dimensions"], saved["instruction"]
    (root / "toy/backbone/descore.json").write_text(json.dumps(saved))


@pytest.mark.slow
@pytest.mark.parametrize("dimensions", [SIX, THREE])
def test_both_stages_train_on_dimensions_of_ones_own(dimensions, world_dir, tmp_path):
    root = tmp_path
    copy_with(dimensions, root)
    train = write_pair_file(root / "train.jsonl", world_dir, dimensions, slice(2))
    test = write_pair_file(root / "held_out.jsonl", world_dir, dimensions, slice(2, 3))
    common = ["--train", train, "--test", test, "--batch-size", 2, "--max-new-tokens", 10, *QUICK]
    short = ["--steps", 1, "--updates", 1, "--group-size", 2]
    run("coldstart.py", "--model", "toy/backbone", "--epochs", 1, *common, root=root)
    run("rl.py", "--model", "runs/coldstart", *short, *common, root=root)
    for stage in ("coldstart", "rl"):
        saved = json.loads((root / f"runs/{stage}/model/descore.json").read_text())
        assert saved["dimensions"] == dimensions and saved["stage"] == stage
        assert '"text rendering": ' in saved["instruction"] and "text rendering" in saved["instruction"][:200]
        assert ("camera" in saved["instruction"]) == ("camera" in dimensions)
        records = lines(root / f"runs/{stage}/metrics.jsonl")
        assert all(math.isfinite(record["loss"]) for record in records if "loss" in record)
        for name in ("accuracy", "accuracy_no_cot", "quality", "format_rate"):
            assert f"held_out/{name}" in records[-1]
    kept = lines(root / "runs/rl/rollouts.jsonl")
    assert len(kept) == 4 and all("reward_quality" in video["rollouts"][0] for video in kept)
    found = run("infer.py", "--pairs", test, "--max-new-tokens", 10, "--json", root=root)  # of runs/rl
    assert {"quality", "accuracy", "format_rate"} <= json.loads(found.stdout).keys()
    processor = DeScore.load(root / "runs/rl", device="cpu").processor  # what is not a copy goes by the model
    assert processor.dimensions == dimensions and processor.instruction == saved["instruction"]
    five = write_pair_file(root / "five.jsonl", world_dir, DEFAULT, slice(1))
    refused = run("rl.py", "--model", "runs/coldstart", "--train", five, "--out", "runs/x", *QUICK,
                  check=False, root=root)
    message = 'five.jsonl, row 1: scores_a is not 0, 1, 2 or "N/A" for each of ' + ", ".join(dimensions)
    assert refused.returncode == 1 and message in refused.stderr


def test_a_run_says_what_lora_leaves_out_and_what_is_the_models_own(model):
    layer = model.qwen.model.language_model.layers[1]
    layer.mlp.experts = torch.nn.Module()  # of a mixture of experts, in one matrix: no linear layer
    layer.mlp.experts.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 3, 4))
    model.processor.instruction = make_instruction(model.processor.dimensions, model.processor.tags)
    model.set_trainable(4)
    trains, left = summary(model)
    assert re.fullmatch(r"\[Reward\] and head 384, LoRA [\d,]+ parameters train, of [\d,]+", trains)
    assert left.endswith(": embed_tokens, layers.*.mlp.experts.gate_up_proj")
    model.processor.dimensions = THREE
    *_, dimensions, instruction = summary(model)
    assert dimensions.endswith("has dimensions of its own: object, motion, text rendering")
    assert instruction.endswith("is asked with an instruction of its own")
    model.set_trainable(0)
    assert not any("LoRA" in line for line in summary(model))


@pytest.mark.parametrize("dimensions", [DEFAULT, SIX, THREE])
def test_rewards_are_about_the_dimensions_at_hand(dimensions):
    processor = SimpleNamespace(dimensions=dimensions, tags=("think", "answer"))
    rewards = rl.make_rewards(rl.Args(), processor)
    gold = dict(zip(dimensions, (2, 0, "N/A", 1, 2, 1)))
    scores = gold | {next(iter(dimensions)): 1}  # one of them is wrong
    text = f"<think>it looks right</think><answer>{json.dumps({'dimensional_scores': scores})}</answer>"
    assert {name: part.weight for name, part in rewards.items()} == {
        "format": 0.1, "quality": 0.7, "length": 0.2}
    found = {name: part.function(text, 1250, gold) for name, part in rewards.items()}
    assert found == {"format": 1.0, "quality": (len(dimensions) - 1) / len(dimensions), "length": 0.5}
    text = text.replace('"text rendering"', '"texture"').replace('"camera"', '"lens"')
    assert all(rewards[name].function(text, 1250, gold) == 0 for name in ("format", "quality"))


def test_a_strict_thought_is_never_longer_than_what_was_written():
    """Cleaning may make more of a text, such as the twelve letters of one sign; it is not paid."""
    processor = SimpleNamespace(dimensions=DEFAULT, tags=("think", "answer"),
                                encode=lambda text: 1250 * [0])
    args = rl.Args(reward=["presets/strict.py:length_reward=0.2"])
    length = rl.make_rewards(args, processor)["length"].function
    answer = json.dumps({"dimensional_scores": dict.fromkeys(DEFAULT, 2)})
    text = f"<think>it looks right</think><answer>{answer}</answer>"
    assert [length(text, n, {}) for n in (1000, 1250, 2000)] == [1 / 3, 0.5, 0.5]


def test_two_rewards_of_one_name_are_refused():
    asked = "presets/release.py:format_reward=1"
    with pytest.raises(DataError, match="another has this name"):
        rl.make_rewards(rl.Args(reward=[asked, asked]), SimpleNamespace(dimensions=DEFAULT, tags=("a", "b")))


@pytest.mark.parametrize("value", [1e308, -1e30, float("nan"), float("inf")])
def test_a_reward_that_overflows_is_refused(value):
    with pytest.raises(DataError, match="the reward 'odd' gave"):
        odd = rl.Reward(0.5, lambda text, n, gold: value, "my.py:odd")
        rl.reward_all({"odd": odd}, ["a"], torch.ones(1, 1), [{}])


# ------------------------------------------------------------------------------------------------------------
# How it thinks

GENERATE = """
import json, torch
from unittest.mock import patch
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures
import rl
from model import DeScore, Thoughts


def think(self, batch, n=1, max_new_tokens=4096, temperature=1.0, top_p=1.0, seeds=None, without_cot=False):
    batch, eos = self.encode(batch), self.processor.eos_id
    tokens = torch.full((len(batch), n, max_new_tokens), eos)
    for b in range(len(batch)):
        one = batch.select([b])
        seen = BaseModelOutputWithDeepstackFeatures(  # the tower has already seen the video
            pooler_output=one.features[0].repeat(n, 1),
            deepstack_features=[level.repeat(n, 1) for level in one.features[1]])
        ids = one.input_ids.repeat(n, 1)
        torch.manual_seed(seeds[b])
        with patch.object(self.qwen.model.visual, "forward", return_value=seen):
            rows = self.qwen.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values_videos=torch.zeros(1),
                mm_token_type_ids=2 * (ids == self.processor.video_id).int(),
                video_grid_thw=one.grid.repeat(n, 1), do_sample=True, temperature=temperature, top_k=0,
                top_p=top_p, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=eos)
        rows = rows[:, ids.shape[1]:]
        tokens[b, :, :rows.shape[1]] = rows
    is_end = tokens == eos
    mask = is_end.cumsum(-1) - is_end.long() == 0
    logps, scores = self.group(batch, tokens, mask, temperature)
    print("thought", json.dumps([self.processor.decode(t[m]) for t, m in zip(tokens[:, 0], mask[:, 0])]))
    return Thoughts(tokens, mask, logps, scores)


DeScore.think = think
rl.main()
"""


@pytest.mark.slow
def test_stage_2_trains_on_what_transformers_own_generate_wrote(world_dir, tmp_path):
    (tmp_path / "generate.py").write_text(GENERATE)
    done = run(tmp_path / "generate.py", *arguments(world_dir, tmp_path / "out", "--think-tokens", 1))
    thought = [json.loads(line.removeprefix("thought ")) for line in done.stdout.splitlines()
               if line.startswith("thought ")]
    assert len(thought) == 2  # a pair at a time
    record = step_of(tmp_path / "out")
    assert record["clip_fraction"] == 0 and record["kl"] < 1e-6  # before the update nothing has moved
    assert record["reward_format"] > 0
    kept = [video["rollouts"][0]["cot"] for video in lines(tmp_path / "out/rollouts.jsonl")]
    assert sorted(kept) == sorted(thought[0] + thought[1])
    assert (tmp_path / "out/model/descore.json").is_file()


SPY = """
import inspect, json, sys
import recited
import rl
from model import DeScore

recited.install()

seen = {"grpo": [], "bt": [], "think": [], "group": [], "reference": []}


def watch(owner, name, note):
    real = getattr(owner, name)

    def watched(*args, **kwargs):
        bound = inspect.signature(real).bind(*args, **kwargs)
        bound.apply_defaults()
        result = real(*args, **kwargs)
        note(bound.arguments, result)
        return result

    setattr(owner, name, watched)


def grpo(given, result):
    plain = {k: v for k, v in given.items() if isinstance(v, (int, float, str, bool, type(None)))}
    mask = given["mask"]
    seen["grpo"].append(plain | {"tokens": mask.sum().item(), "cots": mask.any(-1).sum().item(),
                                 "no_reference": given["ref_logps"] is None})


def think(given, result):
    truncated = given["self"].truncated(result)
    seen["think"].append({k: given[k] for k in ("n", "max_new_tokens", "temperature", "top_p")} | {
        "tokens": result.mask.sum().item(), "left": result.mask[~truncated].sum().item(),
        "truncated": truncated.sum().item(), "lengths": result.mask.sum(-1).flatten().tolist()})


watch(rl, "grpo_loss", grpo)
watch(rl, "bt_loss", lambda given, result: seen["bt"].append(given["count"]))
watch(DeScore, "think", think)
watch(DeScore, "group", lambda given, result: seen["group"].append(
    [given["temperature"], given["self"].max_tokens]))
watch(DeScore, "reference_logps", lambda given, result: seen["reference"].append(given["temperature"]))
rl.main()
print(json.dumps(seen))
"""


def watched(world_dir, folder, *flags):
    """What a step of stage 2 calls, and how."""
    (folder / "spy.py").write_text(SPY)
    done = run(folder / "spy.py", *arguments(world_dir, folder / "out", "--think-tokens", 1, *flags))
    return json.loads(done.stdout.splitlines()[-1])


def test_the_flags_of_stage_2_reach_what_they_are_for(world_dir, tmp_path):
    seen = watched(world_dir, tmp_path, "--loss-mean", "token", "--dual-clip", 3, "--no-advantage-std",
                   "--mask-truncated", "true", "--temperature", 0.7, "--top-p", 0.9, "--clip-low", 0.15,
                   "--clip-high", 0.3, "--beta", 0.01, "--max-tokens", 777, "--max-new-tokens", 109,
                   "--group-size", 6, "--bt-weight", 0.5)
    assert len(seen["think"]) == len(seen["grpo"]) == 2  # a pair at a time
    assert sum(call["truncated"] for call in seen["think"]) > 0 < sum(call["left"] for call in seen["think"])
    for call, thought in zip(seen["grpo"], seen["think"]):
        assert (call["clip_low"], call["clip_high"], call["beta"]) == (0.15, 0.3, 0.01)
        assert (call["loss_mean"], call["dual_clip"]) == ("token", 3)
        assert call["tokens"] == thought["left"]  # of CoTs that were not cut off
        assert call["count"] == sum(call["left"] for call in seen["think"])  # of all of the update
        wanted = {"n": 6, "max_new_tokens": 109, "temperature": 0.7, "top_p": 0.9}
        assert {name: thought[name] for name in wanted} == wanted
    assert seen["reference"] == [0.7, 0.7] and set(map(tuple, seen["group"])) == {(0.7, 777)}
    decided = [pair.human != 0 for pair in first_pairs(world_dir)]
    assert seen["bt"] == [sum(decided) * 6] * 2  # a tie has no winner
    record = step_of(tmp_path / "out")
    assert record["loss"] == pytest.approx(record["grpo_loss"] + 0.5 * record["bt_loss"], abs=1e-6)
    for video in lines(tmp_path / "out/rollouts.jsonl"):
        rewards = [one["reward"] for one in video["rollouts"]]
        found = [one["advantage"] for one in video["rollouts"]]
        assert found == pytest.approx([reward - statistics.fmean(rewards) for reward in rewards], abs=1e-5)


@pytest.mark.parametrize("loss_mean", ["cot", pytest.param("constant", marks=pytest.mark.slow)])
def test_what_the_loss_is_a_mean_of_is_counted_over_the_whole_update(loss_mean, world_dir, tmp_path):
    seen = watched(world_dir, tmp_path, "--loss-mean", loss_mean, "--beta", 0, "--max-new-tokens", 80)
    cots = 2 * 2 * 4  # pairs, videos, rollouts
    for call in seen["grpo"]:
        assert call["count"] == (cots if loss_mean == "cot" else cots * 80)
        assert call["loss_mean"] == loss_mean and call["dual_clip"] is None and call["no_reference"]
        assert call["cots"] == 8  # the cut-off ones are not left out by default
    assert seen["reference"] == []  # β = 0 spares the reference's forward
    step_of(tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------
# Rewards

OWN = """
def colons_reward(text, n_tokens, gold):
    return text.count(":") / 100

def gold_camera(text, n_tokens, gold):
    return 1.0 if gold["camera"] == "N/A" else n_tokens / 1000

def nothing_reward(text, n_tokens, gold):
    return float("nan")
"""


def check_rollouts(out, weights, divide=True):
    """What rollouts.jsonl says adds up: rewards from their parts, advantages from the rewards."""
    kept, has_signal = lines(out / "rollouts.jsonl"), 0
    for video in kept:
        assert video.keys() == {"step", "video", "prompt", "reference", "rollouts"}
        names = {"cot", "reward", "advantage", "score", *(f"reward_{name}" for name in weights)}
        for one in video["rollouts"]:
            assert one.keys() == names and isinstance(one["cot"], str) and math.isfinite(one["score"])
            total = sum(weight * one[f"reward_{name}"] for name, weight in weights.items())
            assert one["reward"] == pytest.approx(total, abs=1e-6)
        R = [one["reward"] for one in video["rollouts"]]
        expected = [0.0] * len(R)
        if max(R) - min(R) > 1e-6:
            has_signal += 1
            std = statistics.stdev(R) if divide else 1
            expected = [(reward - statistics.fmean(R)) / std for reward in R]
        assert [one["advantage"] for one in video["rollouts"]] == pytest.approx(expected, abs=1e-3)
    assert has_signal
    return kept


def test_a_reward_of_ones_own_is_logged_and_weighs(world_dir, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    run("rl.py", *arguments(world_dir, tmp_path / "out", "--reward", f"{tmp_path}/own.py:colons_reward=0.5",
                            f"{tmp_path}/own.py:gold_camera=-2"))
    weights = {"format": 0.1, "quality": 0.7, "length": 0.2, "colons": 0.5, "gold_camera": -2}
    record = step_of(tmp_path / "out")
    assert record["reward"] == pytest.approx(sum(w * record[f"reward_{name}"] for name, w in weights.items()))
    gold = {}
    for pair in read_pairs(world_dir / "train.jsonl"):
        gold |= {pair.video_a: pair.scores_a, pair.video_b: pair.scores_b}
    for video in check_rollouts(tmp_path / "out", weights):
        for one in video["rollouts"]:
            assert one["reward_colons"] == pytest.approx(one["cot"].count(":") / 100)
            assert (one["reward_gold_camera"] == 1) == (gold[video["video"]]["camera"] == "N/A")


@pytest.mark.parametrize(("given", "message"), [
    ("missing.py:f=1", "missing.py"), ("{own}:missing=1", "has no function 'missing'"),
    ("{own}:colons_reward=much", "could not convert string to float: 'much'"),
    ("{own}:colons_reward", "has no =WEIGHT, and is none of format, quality, length"),
    ("{own}=1", "not FILE:FUNCTION=WEIGHT"),
    ("{broken}:f=1", "cannot be imported"), ("{text}:f=1", "is no Python file"),
    ("{own}:nothing_reward=1", "the reward 'nothing' gave")])
def test_what_is_wrong_with_a_reward_is_said_in_one_line(given, message, world_dir, tmp_path):
    for name, text in (("own.py", OWN), ("broken.py", "def f(:"), ("words.txt", "words")):
        (tmp_path / name).write_text(text)
    given = given.format(own=tmp_path / "own.py", broken=tmp_path / "broken.py", text=tmp_path / "words.txt")
    done = run("rl.py", *arguments(world_dir, tmp_path / "out", "--reward", given, "--max-new-tokens", 3),
               check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert message in error and (given in error or "nothing" in given)


HOSTILE = """
import sys
def none(text, n_tokens, gold): pass
def words(text, n_tokens, gold): return "much"
def two(text, n_tokens): return 1.0
def fails(text, n_tokens, gold): return gold["missing"]
def leaves(text, n_tokens, gold): sys.exit("bye")
number, module = 5.0, sys
"""


@pytest.mark.parametrize(("name", "message"), [
    ("none", "none fails (float() argument must be"), ("words", "words fails (could not convert string"),
    ("two", "two fails (two() takes 2 positional arguments but 3 were given)"),
    ("fails", "fails fails ('missing')"), ("leaves", "leaves fails (bye)"),
    ("number", "hostile.py has no function 'number'"), ("module", "hostile.py has no function 'module'")])
def test_a_reward_that_is_wrong_is_named_with_its_error(name, message, tmp_path):
    (tmp_path / "hostile.py").write_text(HOSTILE)
    given = f"{tmp_path}/hostile.py:{name}=1"
    with pytest.raises(DataError) as found:
        *_, function = load_function(given)
        rl.reward_all({name: rl.Reward(1.0, function, given)}, ["text"], torch.ones(1, 1), [{}])
    assert str(found.value).startswith(f"{given}: ") and message in str(found.value)


@pytest.mark.parametrize("content", ["undefined", "import no_such_module", "1 / 0", "raise SystemExit(3)",
                                     "def f(:", "\0", "assert False"])
def test_a_reward_whose_file_fails_is_named(content, tmp_path):
    (tmp_path / "bad.py").write_text(content)
    with pytest.raises(DataError, match=r"bad\.py:f=1: .*bad\.py cannot be imported"):
        load_function(f"{tmp_path}/bad.py:f=1")


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "", "1,5"])
def test_a_reward_has_a_finite_weight(weight):
    with pytest.raises(DataError, match="not FILE:FUNCTION=WEIGHT"):
        load_function(f"presets/release.py:format_reward={weight}")


NESTED = '{"steps": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize("stage", ["coldstart", "rl"])
@pytest.mark.parametrize(("content", "message"), [
    (NESTED, "not JSON"), ('{"out": {"a": 1}}', "neither a text nor a number"),
    ('{"help": true}', "there is no setting 'help'"), ('{"preset": "x"}', "'x': no such file"),
    ('{"preset": "preset.json"}', "builds on itself"), ('{"rl": 1, "coldstart": 1}', "is no stage with its"),
    ('{"rl": {}, "coldstart": {}, "lr": 1}', "'lr' is no stage with its settings"),
    ('{"no_resume": true}', "there is no setting 'no_resume'"), ('{"": 1}', "there is no setting ''"),
    ('{"batch_size": 0}', "'batch_size' is 0 (argument --batch_size"), ('{"lr": "fast"}', "'lr' is 'fast' ("),
    ('{"batch-size": 2.5}', "'batch-size' is 2.5 ("), ('{"lr": NaN}', "'lr' is nan ("),
    ('{"lr": 1e400}', "'lr' is inf ("), ('{"seed": [1, 2]}', "'seed' is [1, 2] ("),
    ('{"fps": true}', "'fps' is True ("),
    ('{"optim": "sgd"}', "'optim' is 'sgd' ("), ('{"out": "--fps"}', "'out' is '--fps' ("),
    ('{"seed": %s}' % ("9" * 4000), "'seed' is 9999"), ('{"resume": "maybe"}', "'resume' is 'maybe' ("),
    ('{"test": [["a"]]}', "neither a text nor a number"), (b"\xff", "not JSON")])
def test_a_bad_value_in_a_preset_is_named_with_its_file(content, message, stage, tmp_path, monkeypatch):
    preset = tmp_path / "preset.json"
    preset.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr("sys.argv", ["x", "--preset", str(preset), "--train", "x"])
    with pytest.raises(DataError) as found:
        parse_args({"coldstart": coldstart, "rl": rl}[stage].Args, stage)
    assert str(found.value).startswith(f"{preset}: ") and message in str(found.value)


# What is odd for a flag that wants a number.
ODD = ["-1", "0", "nan", "inf", "-inf", "1e400", "x", "", "9" * 30, "9" * 5000, "1e-400", "0x10", "\ud800"]
RANGES = {name: value for name, value in vars(command).items() if isinstance(value, type)
          and issubclass(value, (int, float))}


def parsers(monkeypatch):
    """The command lines of ours, by module; and the numbers of each, by flag."""
    found = {}
    for module in (coldstart, rl):
        found[module.__name__] = HfArgumentParser(module.Args)

    def kept(parser):
        found[current] = parser
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", kept)
    for module in (infer, annotate, check):
        current = module.__name__
        with pytest.raises(SystemExit):
            module.main()
    monkeypatch.undo()
    for name, parser in found.items():
        numbers = [action for action in parser._actions if action.type in (int, float, *RANGES.values())]
        found[name] = parser, {action.option_strings[0]: action for action in numbers}
    return found


def test_every_number_of_a_command_line_has_a_range(monkeypatch):
    for name, (parser, numbers) in parsers(monkeypatch).items():
        assert numbers, name
        parser.error = refuse
        for flag, action in numbers.items():
            assert action.type in RANGES.values(), flag
            assert action.default is None or action.type(str(action.default)) == action.default
            refused = set()
            for odd in ODD:
                try:
                    value = getattr(parser.parse_known_args(["a", "b", f"{flag}={odd}"])[0], action.dest)
                except ValueError as error:
                    assert flag in str(error) and "is not a" in str(error)
                    refused.add(odd)
                else:
                    assert type(value) in (int, float)
                    kinds = ["Number"]
                    if odd != "-1":
                        kinds += ["Whole", "NotNegative", "Share", "Temperature"]
                    assert action.type in [RANGES[kind] for kind in kinds]
            assert refused >= set(ODD) - {"-1", "0", "1e-400"}, flag


def refuse(message):
    raise ValueError(message)


@pytest.mark.parametrize("flags", [["--length-low", 60, "--length-high", 60], ["--length-high", 10],
                                   ["--length-excess", 213], ["--length-low", 214]])
def test_bounds_of_the_length_go_together(flags, monkeypatch):
    monkeypatch.setattr("sys.argv", ["rl.py", *map(str, flags)])  # over 54 and 214
    with pytest.raises(DataError, match="do not go together .R_l needs low < high"):
        parse_args(rl.Args, "rl")


def test_a_flag_that_makes_no_sense_is_said_in_a_line():
    done = run("-m", "tools.check", "no such file.jsonl", "--fps", 0, check=False)
    assert done.returncode == 2 and "no such file" not in done.stderr
    assert done.stderr.endswith(" error: argument --fps: '0' is not a number above 0\n")


@pytest.mark.parametrize(("content", "message"), [
    ('{"loss_mean": "token", "clip_hihg": 0.3}', "preset.json: there is no setting 'clip_hihg'"),
    ("[1]", "preset.json"), ("{", "preset.json"), (None, "preset.json")])
def test_what_is_wrong_with_a_preset_is_said_in_one_line(content, message, world_dir, tmp_path):
    if content is not None:
        (tmp_path / "preset.json").write_text(content)
    done = run("rl.py", *arguments(world_dir, tmp_path / "out", "--preset", tmp_path / "preset.json"),
               check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: " in done.stderr and message in done.stderr


@pytest.mark.slow
def test_the_rollouts_of_the_first_videos_are_written_down(world_dir, tmp_path):
    run("rl.py", *arguments(world_dir, tmp_path / "out", "--steps", 2, "--keep-rollouts", 3, "--updates", 2))
    kept = check_rollouts(tmp_path / "out", {"format": 0.1, "quality": 0.7, "length": 0.2})
    expected = []
    for step in (1, 2):
        one, two = (pair.winner_first() for pair in first_pairs(world_dir, step))
        expected += [(step, *one.videos()[0]), (step, *one.videos()[1]), (step, *two.videos()[0])]
    assert [(record["step"], record["video"], record["prompt"]) for record in kept] == expected
    assert all(len(record["rollouts"]) == 4 for record in kept)
    run("rl.py", *arguments(world_dir, tmp_path / "none", "--keep-rollouts", 0))
    assert lines(tmp_path / "none/rollouts.jsonl") == []


# ------------------------------------------------------------------------------------------------------------
# The shape of the code. These tests are of taste: `-m "not slow and not house"` leaves them out.


@pytest.mark.house
def test_the_method_is_five_files():
    assert sorted(ROOT.glob("*.py")) == sorted(FIVE)


@pytest.mark.house
def test_nothing_imports_in_a_circle():
    modules = {path.stem: path for path in FIVE}
    modules |= {f"support.{path.stem}": path for path in (ROOT / "support").glob("[a-z]*.py")}
    imports = {}
    for name, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):  # those within functions too
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        imports[name] = found & modules.keys()
    assert "support.run" in imports["rl"] and "data" in imports["model"]
    list(TopologicalSorter(imports).static_order())  # raises CycleError
    assert imports["data"] == {"support.above", "support.frames"} and not imports["support.frames"]


@pytest.mark.house
def test_functions_fit_on_a_page():
    """But for a stage's main, which is the run from its first line to its last."""
    lengths = {}
    for path in FIVE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name != "main":
                lengths[path.stem, node.name, node.lineno] = node.end_lineno - node.lineno + 1
    assert {where: length for where, length in lengths.items() if length > 60} == {}


@pytest.mark.house
def test_no_line_holds_two_loops_of_a_comprehension():
    """Nor of one within another."""
    for path in FIVE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
                loops = [loop.target.lineno for loop in ast.walk(node) if isinstance(loop, ast.comprehension)]
                assert len(set(loops)) == len(loops), f"{path.name}:{node.lineno}"


@pytest.mark.house
def test_the_dual_objective_stands_in_main_as_the_paper_has_it():
    text = (ROOT / "rl.py").read_text()
    (main,) = [node for node in ast.parse(text).body if getattr(node, "name", None) == "main"]
    assert "L = L_GRPO + λ * L_BT\n" in ast.get_source_segment(text, main)
