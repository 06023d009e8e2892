"""R and the presets: the paper's R by default, the release's and the strict one on request, and a run says
which it had."""

import json
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TOY_VIDEO
from launch import run, run_ranks
from transformers import AutoTokenizer

import coldstart
import rl
from data import DIMENSIONS, DataError, Processor
from model import DeScore
from presets import release
from support.files import read_json
from support.settings import parse_args
from tools.journal import made_by

BACKBONE = ROOT / "toy/backbone"
QUICK = [*TOY_VIDEO, "--workers", 0, "--no-gradient-checkpointing", "--eval-before", "false"]
SMALL = ["--steps", 1, "--batch-size", 2, "--updates", 1, "--group-size", 4, "--max-new-tokens", 150]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def settings_of(stage, monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["stage", "--train", "x", "--model", "y", *map(str, flags)])
    return parse_args(stage.Args, stage.__name__)


# ------------------------------------------------------------------------------------------------------------
# The release's rewards: what its code gives, worked out by hand for the reference 2, 1, "N/A", 0, 2

GOLD = {"subject": 2, "dynamics": 1, "camera": "N/A", "environment": 0, "style": 2}
FIVE = '{"subject": 2, "dynamics": 1, "camera": "N/A", "environment": 0, "style": 2}'
WHOLE = f'{{"dimensional_scores": {FIVE}}}'


@pytest.mark.parametrize(("text", "form", "quality"), [
    (f"<think>x</think><answer>{WHOLE}</answer>", 1, 1),
    (f"<answer>{WHOLE}</answer>", 1, 1),  # no thought
    (f"So: <answer>{WHOLE}</answer> Done.", 1, 1),  # text around the block
    (f"<answer>\n```json\n{WHOLE}\n```\n</answer>", 1, 1),
    (f"<answer>```{WHOLE}```</answer>", 1, 1),  # a fence without a name
    (f"<answer>Here it is: ```json\n{WHOLE}\n``` as asked</answer>", 1, 1),  # text around the fence
    (f"<answer>Here it is: {WHOLE}</answer>", 0, 0),  # text beside the JSON
    (f"<answer>{WHOLE} as asked</answer>", 0, 0),
    (f"<answer>```json\nso: {WHOLE}\n```</answer>", 0, 0),
    (f"<answer>```JSON\n{WHOLE}\n```</answer>", 0, 0),  # JSON is not json, and no JSON
    (f"<answer>{WHOLE}", 0, 0),  # not closed
    (WHOLE, 0, 0),  # no tags
    (f"{WHOLE}</answer>", 0, 0),
    (f"<answer>{WHOLE}</answer><answer>none</answer>", 1, 1),  # the first one counts
    (f"<answer>none</answer><answer>{WHOLE}</answer>", 0, 0),
    (f"<answer>{WHOLE[:-1]},}}</answer>", 0, 0),  # a comma too many
    ("<answer>{}</answer>", 0, 0),
    ('<answer>{"overall_score": 3}</answer>', 0, 0),
    ('<answer>{"dimensional_scores": {}}</answer>', 1, 0),
    ('<answer>{"dimensional_scores": {"subject": 2}}</answer>', 1, 1 / 5),  # a subset
    ('<answer>{"dimensional_scores": {"subject": 2, "style": 2, "sound": 2}}</answer>', 1, 2 / 5),
    ('<answer>{"dimensional_scores": {"subject": 9, "dynamics": 1}}</answer>', 1, 1 / 5),
    ('<answer>{"dimensional_scores": {"subject": [2], "dynamics": {"score": 1}}}</answer>', 1, 0),
    ('<answer>{"dimensional_scores": {"subject": "2", "dynamics": "1"}}</answer>', 1, 2 / 5),  # ours
    ('<answer>{"dimensional_scores": {"camera": "n/a", "environment": null}}</answer>', 1, 0),
    ('<answer>{"dimensional_scores": 5}</answer>', 1, 0),
    (f'<answer>{{"dimensional_scores": {{"subject": 0}}, "dimensional_scores": {FIVE}}}</answer>', 1, 1),
    ("<answer>[1, 2]</answer>", 0, 0), ("<answer>3</answer>", 0, 0), ("<answer></answer>", 0, 0), ("", 0, 0),
])
def test_the_releases_format_and_quality(text, form, quality):
    assert release.format_reward(text, 7, GOLD) == form
    assert release.quality_reward(text, 7, GOLD) == pytest.approx(quality)


@pytest.mark.parametrize(("length", "expected"),
                         [(0, 0), (499, 0), (500, 0.2), (999, 0.2), (1000, 0.4), (1499, 0.4), (1500, 0.6),
                          (1999, 0.6), (2000, 1), (9999, 1)])
def test_the_releases_length_reward_goes_by_characters_in_steps(length, expected):
    assert release.length_reward("é" * length, 7, {}) == expected


# ------------------------------------------------------------------------------------------------------------
# Presets

STAGES = {"coldstart": coldstart, "rl": rl}


def test_one_table_says_what_paper_release_and_default_are():
    presets = {name: read_json(ROOT / f"presets/{name}.json") for name in ("paper", "release")}
    said = set()
    for line in (ROOT / "presets/README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] not in STAGES or "reward" in cells[1]:
            continue
        stage, flag = cells[0], cells[1].strip("`")
        said.add((stage, flag))
        for name, cell in zip(presets, cells[2:4]):
            assert presets[name][stage].get(flag, "–") == (cell if cell == "–" else json.loads(cell)), line
        default = getattr(STAGES[stage].Args(), flag)
        assert default == json.loads(cells[4]), line
    in_presets = {(stage, flag) for preset in presets.values() for stage in preset for flag in preset[stage]}
    assert in_presets - {("rl", "reward")} == said


def test_the_papers_preset_is_the_papers_text(monkeypatch):
    """By the table of settings in Section "Stage 2", written here once more."""
    args = settings_of(rl, monkeypatch, "--preset", "presets/paper.json")
    assert (args.lora_rank, args.lr, args.shard, args.steps, args.batch_size, args.updates) == (
        0, 1e-6, "full", 65, 128, 1)
    assert (args.group_size, args.max_new_tokens, args.clip_low, args.clip_high) == (8, 4096, 0.2, 0.2)
    assert (args.bt_weight, args.w_format, args.w_quality, args.w_length) == (0.005, 0.1, 0.7, 0.2)
    assert (args.length_low, args.length_high, args.reward, args.loss_mean) == (500, 2000, [], "cot")
    first = settings_of(coldstart, monkeypatch, "--preset", "presets/paper.json")
    assert (first.lora_rank, first.batch_size, first.epochs, first.weight_decay) == (64, 32, 2, 0.01)


def test_the_old_name_of_the_releases_preset_still_works(monkeypatch):
    for stage in STAGES.values():
        old = settings_of(stage, monkeypatch, "--preset", "support/release.json")
        new = settings_of(stage, monkeypatch, "--preset", "presets/release.json")
        old.preset = new.preset
        assert old == new
    assert new.clip_high == 0.3 and new.log_ratio_bound == 20


def test_none_takes_back_what_a_preset_sets(monkeypatch, tmp_path):
    flags = ["--preset", "presets/release.json"]
    for flag in ("--shard", "--dual-clip", "--kl-bound"):
        flags += [flag, "none"]
    args = settings_of(rl, monkeypatch, *flags)
    assert (args.shard, args.dual_clip, args.kl_bound, args.log_ratio_bound) == (None, None, None, 20)
    assert settings_of(rl, monkeypatch, *flags, "--reward", "none").reward == []
    assert settings_of(rl, monkeypatch, *flags, "--reward", "none", "my.py:f=1").reward == ["my.py:f=1"]
    (tmp_path / "base.json").write_text('{"shard": "full", "dual_clip": 3, "reward": ["a.py:f=1"]}')
    mine = {"shard": None, "preset": "base.json", "reward": ["none", "b.py:f=1"]}
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    args = settings_of(rl, monkeypatch, "--preset", tmp_path / "mine.json")
    assert (args.shard, args.dual_clip, args.reward) == (None, 3, ["b.py:f=1"])


def test_a_reward_of_the_command_line_is_added_to_the_presets(monkeypatch):
    flags = ["--preset", "presets/strict.json", "--reward", "my.py:brevity=0.1", "--reward", "my.py:other=-2"]
    strict = read_json(ROOT / "presets/strict.json")["rl"]["reward"]
    assert settings_of(rl, monkeypatch, *flags).reward == [*strict, "my.py:brevity=0.1", "my.py:other=-2"]


def test_shards_without_torchrun_are_one_line(world_dir, tmp_path):
    done = run("rl.py", "--preset", "presets/paper.json", "--model", BACKBONE, "--train",
               world_dir / "train.jsonl", "--out", tmp_path, *QUICK, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "--shard full needs torchrun" in done.stderr and "--shard none" in done.stderr


@pytest.mark.parametrize("preset", ["release", pytest.param("strict", marks=pytest.mark.slow)])
def test_a_step_of_a_preset(preset, world_dir, tmp_path):
    """Both stages take it, and R adds up from its own functions."""
    common = ["--preset", f"presets/{preset}.json", "--shard", "none", *QUICK]
    run("coldstart.py", "--model", BACKBONE, "--train", world_dir / "train_cots.jsonl", "--epochs", 1,
        "--out", tmp_path / "one", *[flag for flag in common if flag not in ("--shard", "none")])
    done = run("rl.py", "--model", tmp_path / "one", "--train", world_dir / "train.jsonl", "--out",
               tmp_path / "two", "--lora-rank", 0 if preset == "release" else 64, *SMALL, *common)
    weights = {"format": 0.1, "quality": 0.7, "length": 0.2}
    own = {"release": weights, "strict": ["format", "length"]}[preset]
    sources = {name: f"presets/{preset}.py:{name}_reward" if name in own else f"rl.py:{name}_reward"
               for name in weights}
    assert "R = " + " + ".join(f"{weights[name]:g} · {sources[name]}" for name in weights) in done.stdout
    about = json.loads((tmp_path / "two/settings.json").read_text())
    assert about["reward"] == {sources[name]: weights[name] for name in weights}
    functions = {name: vars(__import__(f"presets.{preset}", fromlist=["x"])).get(f"{name}_reward")
                 for name in own}
    offered = {}
    if preset == "strict":
        offered = {"processor": DeScore.load(tmp_path / "two").processor}
    for video in lines(tmp_path / "two/rollouts.jsonl"):
        for one in video["rollouts"]:
            total = sum(weight * one[f"reward_{name}"] for name, weight in weights.items())
            assert one["reward"] == pytest.approx(total, abs=1e-6)
            if preset == "release":
                for name, function in functions.items():
                    assert one[f"reward_{name}"] == function(one["cot"], 0, video["reference"])
            else:
                format_reward = functions["format"]
                assert one["reward_format"] == format_reward(one["cot"], 0, {}, **offered)
    page = run("-m", "tools.report", tmp_path / "two")
    assert page.returncode == 0
    assert json.dumps(sources["format"])[1:-1] in (tmp_path / "two/report.html").read_text()


@pytest.mark.slow
def test_a_step_of_the_papers_preset_on_two_ranks(world_dir, tmp_path):
    common = ["--preset", "presets/paper.json", *QUICK]
    run("coldstart.py", "--model", BACKBONE, "--train", world_dir / "train_cots.jsonl", "--epochs", 1,
        "--out", tmp_path / "one", *common)
    run_ranks(2, "rl.py", "--model", tmp_path / "one", "--train", world_dir / "train.jsonl", "--out",
              tmp_path / "two", *SMALL, *common)
    (record,) = [record for record in lines(tmp_path / "two/metrics.jsonl") if "loss" in record]
    assert record["grad_norm"] > 0 and record["left_out"] == 0
    saved = json.loads((tmp_path / "two/model/descore.json").read_text())
    assert "backbone" not in saved  # whole weights
    assert saved["args"]["shard"] == "full" and saved["args"]["lr"] == 1e-6


# ------------------------------------------------------------------------------------------------------------
# Rewards of one's own


def test_a_reward_may_ask_for_processor_and_settings(tmp_path):
    (tmp_path / "my.py").write_text(
        "def plain(text, n_tokens, gold): return n_tokens\n"
        "def asks(text, n_tokens, gold, args, processor): return args.length_high + len(processor.tags)\n"
        "def own(text, args, processor): return 7\n"
        "def default(text, n_tokens, gold, *, processor=None): return len(processor.encode(text))\n")
    processor = SimpleNamespace(tags=("a", "b"), dimensions=DIMENSIONS, encode=list)
    asked = [f"{tmp_path}/my.py:{name}=1" for name in ("plain", "asks", "own", "default")]
    rewards = rl.make_rewards(rl.Args(length_high=900, reward=asked), processor)
    values = {name: part.function("text", 5, {}) for name, part in rewards.items() if "my.py" in part.source}
    assert values == {"plain": 5, "asks": 902, "own": 7, "default": 4}  # the first three go by their place


def test_a_reward_cannot_change_the_references_of_others(tmp_path):
    (tmp_path / "my.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Kept:\n    score: int = 0\n\n"
        "def greedy(text, n_tokens, gold): return float(gold.pop('style') == 2)\n")
    processor = SimpleNamespace(tags=("think", "answer"), dimensions=DIMENSIONS)
    rewards = rl.make_rewards(rl.Args(reward=[f"{tmp_path}/my.py:greedy=1"]), processor)
    gold = dict(GOLD)
    _, parts = rl.reward_all(rewards, ["one", "two"], torch.ones(1, 2), [gold])
    assert gold == GOLD and parts["reward_greedy"].tolist() == [[1, 1]]


def test_a_presets_rewards_have_the_weights_of_the_flags(monkeypatch):
    processor = SimpleNamespace(tags=("a", "b"), dimensions=DIMENSIONS)
    for preset in ("strict", "release"):
        args = settings_of(rl, monkeypatch, "--preset", f"presets/{preset}.json", "--w-format", 0.5,
                           "--w-length", 0)
        rewards = rl.make_rewards(args, processor)
        assert {name: part.weight for name, part in rewards.items()} == {
            "format": 0.5, "quality": 0.7, "length": 0}
        assert rewards["format"].source == f"presets/{preset}.py:format_reward"


def test_a_reward_without_a_weight_must_be_one_of_ours_and_one_part_is_asked_for_once(tmp_path):
    (tmp_path / "my.py").write_text("def length(text, n_tokens, gold): return 1\nbrevity = length\n")
    processor = SimpleNamespace(tags=("a", "b"), dimensions=DIMENSIONS)
    with pytest.raises(DataError, match="my.py:brevity: has no =WEIGHT"):
        rl.make_rewards(rl.Args(reward=[f"{tmp_path}/my.py:brevity"]), processor)
    with pytest.raises(DataError, match="another has this name"):
        rl.make_rewards(rl.Args(reward=["presets/release.py:length_reward", f"{tmp_path}/my.py:length=1"]),
                        processor)


def test_the_bounds_of_the_released_code_hold_ratios_and_kl():
    logps = torch.tensor([[[30.0, -30.0, 0.5]]], dtype=torch.double, requires_grad=True)
    old = torch.zeros(1, 1, 3, dtype=torch.double)
    mask = torch.ones(1, 1, 3, dtype=torch.bool)
    A = torch.tensor([[-1.0]], dtype=torch.double)
    beta = 0.25
    loss, figures = rl.grpo_loss(logps, old, old, A, mask, 0.2, 0.2, beta, log_ratio_bound=20, kl_bound=10)
    e = torch.e
    ratios = [e**20, e**-20, e**0.5]  # log ρ is held at ± 20
    kls = [e**-20 + 20 - 1, e**20 - 20 - 1, e**-0.5 + 0.5 - 1]  # and so is log π_ref/π_θ
    kls = [min(kl, 10) for kl in kls]
    objectives = [min(-ratio, -min(max(ratio, 0.8), 1.2)) for ratio in ratios]
    expected = -sum(objective - beta * kl for objective, kl in zip(objectives, kls)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert figures["kl"].item() == pytest.approx(sum(kls) / 3, rel=1e-9)
    _, unbounded = rl.grpo_loss(logps, old, old, A, mask, 0.2, 0.2, beta, log_ratio_bound=20)
    kls = [e**-20 + 20 - 1, e**20 - 20 - 1, e**-0.5 + 0.5 - 1]
    assert unbounded["kl"].item() == pytest.approx(sum(kls) / 3, rel=1e-9)
    loss.backward()
    assert logps.grad[0, 0, :2].tolist() == [0, 0] and logps.grad[0, 0, 2] != 0


# ------------------------------------------------------------------------------------------------------------
# Instruction, tags, and what is written without them


@pytest.mark.slow
def test_a_run_says_where_no_rollout_keeps_the_format(world_dir, tmp_path):
    (tmp_path / "odd.txt").write_text("<video><prompt>\nSay anything.")
    flags = ["--model", BACKBONE, "--train", world_dir / "train.jsonl", "--lora-rank", 4, *SMALL, *QUICK,
             "--steps", 3, "--batch-size", 1, "--group-size", 2]
    done = run("rl.py", *flags, "--max-new-tokens", 9, "--out", tmp_path / "cut")  # no answer fits
    (said,) = [line for line in done.stderr.splitlines() if "keeps the format" in line]
    wrote = [one["cot"] for video in lines(tmp_path / "cut/rollouts.jsonl") if video["step"] <= 2
             for one in video["rollouts"]]
    assert any(json.dumps(cot, ensure_ascii=False) in said for cot in wrote)
    whole = run("rl.py", *flags, "--temperature", 0.2, "--out", tmp_path / "whole")
    kept = [record["reward_format"] for record in lines(tmp_path / "whole/metrics.jsonl") if "loss" in record]
    assert max(kept[:2]) > 0 and "keeps the format" not in whole.stderr
    one = run("rl.py", *flags, "--max-new-tokens", 9, "--steps", 1, "--out", tmp_path / "one")
    assert "keeps the format" in one.stderr  # of as many steps as there are


@pytest.mark.slow
def test_both_stages_ask_with_another_instruction_and_save_it(world_dir, tmp_path):
    text = "<video>It was made from: <prompt>\nThink, then judge."
    (tmp_path / "mine.txt").write_text(text)
    common = ["--instruction", tmp_path / "mine.txt", "--lora-rank", 4, *QUICK]
    run("coldstart.py", "--model", BACKBONE, "--train", world_dir / "train_cots.jsonl", "--epochs", 1,
        "--out", tmp_path / "one", *common)
    assert DeScore.load(tmp_path / "one").processor.instruction == text
    run("rl.py", "--model", BACKBONE, "--train", world_dir / "train.jsonl", "--out", tmp_path / "two", *SMALL,
        "--max-new-tokens", 9, *common)
    assert DeScore.load(tmp_path / "two").processor.instruction == text
    refused = run("rl.py", "--model", BACKBONE, "--train", world_dir / "train.jsonl", "--instruction",
                  "problem", "--out", tmp_path / "three", check=False)
    assert refused.returncode == 1 and "training asks all pairs with one instruction" in refused.stderr


def test_the_tags_stand_in_one_place_and_travel_with_a_model(model, tmp_path):
    tags = ("reason", "verdict")
    old = model.processor
    model.processor = Processor(old.tokenizer, old.settings, tags=tags)
    model.save(tmp_path / "model")
    processor = DeScore.load(tmp_path / "model").processor
    assert processor.tags == tags
    rewards = rl.make_rewards(rl.Args(), processor)
    text = f"<reason>so</reason><verdict>{json.dumps({'dimensional_scores': GOLD})}</verdict>"
    assert [rewards[name].function(text, 9, GOLD) for name in ("format", "quality")] == [1, 1]
    ours = text.replace("reason", "think").replace("verdict", "answer")
    assert [rewards[name].function(ours, 9, GOLD) for name in ("format", "quality")] == [0, 0]
    path = tmp_path / "model/descore.json"
    info = json.loads(path.read_text()) | {"tags": ["think"]}
    path.write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"descore\.json: 'tags' is \['think'\]"):
        DeScore.load(tmp_path / "model")


TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\nOPENING{% endif %}")


def test_a_template_that_opens_the_thought_is_followed(model, keys):
    """A -Thinking checkpoint's prompt ends with <think>: the tag is counted, and is read once."""
    plain = model.processor
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    tokenizer.chat_template = TEMPLATE.replace("OPENING", "<think>\n")
    thinking = Processor(tokenizer, plain.settings, plain.instruction, plain.dimensions)
    assert thinking.opening == "<think>\n"
    cot = f"<think>\nit moves</think><answer>{json.dumps({'dimensional_scores': GOLD})}</answer>"
    rest = thinking.encode(cot.removeprefix("<think>\n"))
    assert thinking.encode_cot(cot) == rest and thinking.decode(rest) == cot
    assert rl.format_reward(thinking.decode(rest)) == 1
    assert thinking.encode_cot(f" \n{cot}") == rest  # white space may stand before the tag
    assert thinking.encode_cot(cot.replace("<think>\n", "<think>")) == rest  # or none behind it
    sample = thinking(*keys[0])
    text = tokenizer.decode(sample.input_ids)
    assert text.endswith("assistant\n<think>\n") and text.count("<think>") == 1
    scores = model.score(plain.collate([plain(*keys[0])]), [cot])
    model.processor = thinking
    again = model.score(thinking.collate([sample]), [cot])
    assert torch.allclose(scores, again, rtol=1e-6)  # the same tokens, wherever the tag stands
    assert made_by(model, Namespace())["opening"] == "<think>\n"  # judged with it is judged otherwise
    assert not torch.allclose(scores, model.score(thinking.collate([sample]), ["<think>\n" + cot]), rtol=1e-3)


def test_a_template_that_opens_with_something_else_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    for opening in ("", " \n"):
        tokenizer.chat_template = TEMPLATE.replace("OPENING", opening)
        assert Processor(tokenizer).opening == ""
    tokenizer.chat_template = TEMPLATE.replace("OPENING", "<reason>")
    with pytest.raises(DataError, match="chat template begins an answer with '<reason>'"):
        Processor(tokenizer)
    tokenizer.chat_template = TEMPLATE.replace("OPENING", "{% if %}")
    with pytest.raises(DataError, match="its chat template fails"):
        Processor(tokenizer)
