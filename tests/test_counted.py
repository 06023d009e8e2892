"""What counts and what does not: a pair that cannot be read, a rank's spare, a rollout that was cut off.

Every figure that a stage logs, and what is in it. A pair that cannot be read, and a spare, are in none.

    stage 1
        loss, accuracy, margin                    pairs
        grad_norm, left_out, lr                   steps
    stage 2
        reward, reward_format, reward_quality,
        reward_length, reward_range, no_signal,
        advantage_spread, cot_tokens, truncated,
        entropy                                   rollouts, those too that were cut off
        grpo_loss, kl, clip_fraction, ratio_max,
        logp_gap                                  learnt rollouts: with --mask-truncated those that ended
        bt_loss, bt_accuracy                      decided pairs, whether or not their rollouts ended
        loss                                      updates with a learnt rollout or a decided pair
        grad_norm, left_out                       updates
"""

import json
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TOY_VIDEO
from launch import run, run_ranks
from safetensors.torch import load_file

from coldstart import order
from data import DIMENSIONS, DataError, Pairs
from support.run import Skipped

FIGURES = {
    "coldstart": {"loss", "accuracy", "margin", "grad_norm", "left_out", "lr"},
    "rl": {"reward", "reward_format", "reward_quality", "reward_length", "reward_range", "no_signal",
           "advantage_spread", "cot_tokens", "truncated", "entropy", "grpo_loss", "kl", "clip_fraction",
           "ratio_max", "logp_gap", "bt_loss", "bt_accuracy", "loss", "grad_norm", "left_out"}}
COMMON = ["--model", ROOT / "toy/backbone", *TOY_VIDEO, "--lora-rank", 4, "--workers", 0, "--save-every", 1,
          "--eval-before", "false", "--no-gradient-checkpointing"]
LR = 1e-3
STAGE1 = ["--epochs", 1, "--mask-p", 0, "--warmup", 1, "--max-tokens", 3300, "--lr", LR]
G = 4
BT_WEIGHT = 0.5
STAGE2 = ["--steps", 1, "--group-size", G, "--mask-truncated", "true", "--length-low", 20,
          "--length-high", 80, "--beta", 0.1, "--bt-weight", BT_WEIGHT, "--think-tokens", 4500,
          "--keep-rollouts", 99]
# Rollouts recite (tests/recited.py): two whole CoTs, one that 58 tokens cut off, and one without an answer.
LIMIT = 58
SCORES = {"dimensional_scores": dict(zip(DIMENSIONS, (2, 1, "N/A", 2, 0), strict=True))}
ANSWER = f"<answer>{json.dumps(SCORES)}</answer>"
COTS = [f"<think>red red red</think>{ANSWER}", f"<think>seen</think>{ANSWER.replace('2', '1')}",
        f"<think>{'seen red circle, ' * 4}</think>{ANSWER}", "<think>red</think>"]
RECITED = f"""
import recited
import rl
from support.command import run_command

recited.COTS[:] = {COTS}
recited.install()
run_command(rl.main)
"""

# By how many words the prompts of ten pairs are longer, and which of their videos are broken. Two ranks take
# the longest two first, then the next two. So in the first step rank 1 alone meets the broken pair, with one
# that can be read and a spare of the shortest in one micro-batch, and rank 0 has three together; in the
# second the broken one is the last, and rank 1's spare repeats it.
WORDS = (12, 6, 24, 0, 18, 12, 6, 24, 0, 0)
WRONG = {4: "b", 9: "ab"}
TIES = {"coldstart": [], "rl": [1]}
STEPS = {"coldstart": [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], "rl": [[0, 1, 2, 3, 4]]}
READABLE = {"coldstart": [[0, 1, 2, 3], [5, 6, 7, 8]], "rl": [[0, 1, 2, 3]]}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_pairs(path, steps, world_dir, broken, ties=()):
    """A pair file such that a run takes these pairs in these steps. Each side has a broken file of its own,
    for a video preferred to itself is left out."""
    beside = broken.with_name("broken_a.mp4")
    beside.write_bytes(broken.read_bytes())
    rows = lines_of(world_dir / "train_cots.jsonl")
    numbers = [number for step in steps for number in step]
    lines = [""] * len(numbers)
    for number, place in zip(numbers, order(len(numbers), 1, 0)):
        row = rows[number]
        row["prompt"] = "A circle" + " red" * WORDS[number]
        row["preference"] = "tie" if number in ties else "AB"[number % 2]
        for side in "ab":
            is_wrong = side in WRONG.get(number, "")
            file = {"a": beside, "b": broken}[side] if is_wrong else world_dir / row[f"video_{side}"]
            row[f"video_{side}"] = str(file)
        lines[place] = json.dumps(row) + "\n"
    path.write_text("".join(lines))
    return path


def figures(out):
    """Of each step all that is logged, but for times."""
    found = []
    for record in lines_of(out / "metrics.jsonl"):
        if "loss" in record:
            found.append({name: value for name, value in record.items() if not name.startswith("seconds")})
    return found


def moments(out, step):
    """Adam's mean of the gradients up to a step, in one vector: it goes by the gradients themselves, where
    the weights go by little more than their signs."""
    state = load_file(out / f"checkpoints/step-{step}/rank-0.safetensors")
    return torch.cat([state[name].flatten() for name in sorted(state) if name.endswith("/exp_avg")])


def weights(out):
    found = {}
    for path in (out / "model").glob("*.safetensors"):
        found |= load_file(path)
    return found


class Runs:
    """Of a stage: a run without the broken pairs, and the same with them, on one rank and on two."""

    def __init__(self, stage, world_dir, folder):
        self.stage = stage
        self.broken = folder / "broken.mp4"
        self.broken.write_bytes(b"not a video" * 100)
        if stage == "coldstart":
            command = ["coldstart.py", *STAGE1]
        else:
            (folder / "recite.py").write_text(RECITED)
            command = [folder / "recite.py", *STAGE2, "--updates", 1, "--max-new-tokens", LIMIT, "--lr", LR]
        self.plain = folder / "plain"
        self.one = folder / "one"
        self.two = folder / "two"
        for out, steps in ((self.plain, READABLE), (self.one, STEPS), (self.two, STEPS)):
            train = folder / f"{out.name}.jsonl"
            write_pairs(train, steps[stage], world_dir, self.broken, TIES[stage])
            run_ranks(2 if out is self.two else 1, *command, *COMMON, "--train", train, "--out", out,
                      "--batch-size", len(steps[stage][0]), "--max-skipped", 0.2)  # as many are broken


@pytest.fixture(scope="module", params=["coldstart", "rl"])
def runs(request, world_dir, tmp_path_factory):
    return Runs(request.param, world_dir, tmp_path_factory.mktemp(request.param))


def test_a_broken_pair_and_a_spare_are_in_no_figure(runs):
    expected = figures(runs.plain)
    for record in expected:
        assert record.keys() - {"step"} == FIGURES[runs.stage]
    for out in (runs.one, runs.two):
        for found, plain in zip(figures(out), expected, strict=True):
            for name in ("ratio_max", "logp_gap"):  # of rounding
                assert found.pop(name, 0) == pytest.approx(plain.get(name, 0), abs=1e-3)
            plain = {name: value for name, value in plain.items() if name not in ("ratio_max", "logp_gap")}
            assert found == pytest.approx(plain, rel=1e-3, abs=1e-5), out.name


def test_a_broken_pair_and_a_spare_have_no_gradient(runs):
    expected = weights(runs.plain)
    for out in (runs.one, runs.two):
        for step in range(1, len(STEPS[runs.stage]) + 1):
            apart = moments(out, step) - moments(runs.plain, step)
            assert apart.norm() <= 0.01 * moments(runs.plain, step).norm(), (out.name, step)
        found = weights(out)
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            apart = (found[name] - weight).square().mean().sqrt()
            assert apart <= 0.2 * LR, (out.name, name)


def test_a_broken_pair_is_listed_once_whichever_rank_meets_it(runs):
    assert not (runs.plain / "skipped.jsonl").read_text()
    broken = str(runs.broken)
    for out in (runs.one, runs.two):
        found = lines_of(out / "skipped.jsonl")
        expected = [WRONG[number] for step in STEPS[runs.stage] for number in step if number in WRONG]
        counts = [sum("broken" in video.rpartition("/")[2] for video in record["videos"]) for record in found]
        assert counts == [len(wrong) for wrong in expected]
        assert all(record["error"].startswith(f"{broken}: not a video") for record in found)
        met = [number for step in STEPS[runs.stage] for number in step if number in WRONG]
        assert [record["prompts"] for record in found] == [["A circle" + " red" * WORDS[n]] * 2 for n in met]


def test_rollouts_of_what_can_be_read_are_written_down_in_their_order(runs):
    if runs.stage == "coldstart":
        return
    expected = lines_of(runs.plain / "rollouts.jsonl")
    assert len(expected) == 2 * len(READABLE["rl"][0])
    for out in (runs.one, runs.two):
        for found, plain in zip(lines_of(out / "rollouts.jsonl"), expected, strict=True):
            rollouts = list(zip(found.pop("rollouts"), plain["rollouts"], strict=True))
            assert found == {name: plain[name] for name in found}
            for one, other in rollouts:
                assert one.pop("cot") == other["cot"]
                assert one == pytest.approx({name: other[name] for name in one}, rel=1e-3, abs=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Rollouts that are cut off, calculated by hand


@pytest.fixture(scope="module", params=[LIMIT, pytest.param(4, marks=pytest.mark.slow)])  # some, all
def by_hand(request, world_dir, tmp_path_factory):
    """A step of three updates, of a tie, of a decided pair, and of a broken and a decided one: its figures
    and its rollouts. Nothing moves, so that the scores of the rollouts are those of each update's L_BT."""
    folder = tmp_path_factory.mktemp("by_hand")
    (folder / "broken.mp4").write_bytes(b"not a video" * 100)
    (folder / "recite.py").write_text(RECITED)
    train = folder / "pairs.jsonl"
    write_pairs(train, [[1, 0, 4, 2]], world_dir, folder / "broken.mp4", ties=[1])
    run(folder / "recite.py", *STAGE2, *COMMON, "--train", train, "--out", folder, "--batch-size", 4,
        "--updates", 3, "--max-new-tokens", request.param, "--lr", 0, "--max-skipped", 0.25)
    (record,) = figures(folder)
    videos = [video["rollouts"] for video in lines_of(folder / "rollouts.jsonl")]
    return record, [videos[:2], videos[2:4], videos[4:]]  # the winner, or a tie's A, is the first of two


def ended(rollout):
    return rollout["cot"] in COTS


def test_advantages_are_of_all_rollouts_of_a_group(by_hand):
    _, pairs = by_hand
    for group in [group for pair in pairs for group in pair]:
        R = torch.tensor([rollout["reward"] for rollout in group])
        A = torch.tensor([rollout["advantage"] for rollout in group])
        expected = (R - R.mean()) / R.std() if R.max() > R.min() else 0 * R
        torch.testing.assert_close(A, expected, rtol=1e-4, atol=1e-5)


def test_rewards_are_logged_of_all_rollouts(by_hand, model):
    record, pairs = by_hand
    groups = [group for pair in pairs for group in pair]
    rollouts = [rollout for group in groups for rollout in group]
    assert len(rollouts) == 6 * G
    names = [name for name in rollouts[0] if "reward" in name]
    expected = {name: fmean(rollout[name] for rollout in rollouts) for name in names}
    expected["truncated"] = fmean(not ended(rollout) for rollout in rollouts)
    lengths = [len(model.processor.encode(rollout["cot"])) + ended(rollout) for rollout in rollouts]
    expected["cot_tokens"] = fmean(lengths)  # with the token that ends it
    expected["advantage_spread"] = fmean(abs(rollout["advantage"]) for rollout in rollouts)
    spreads = []
    for group in groups:
        rewards = [rollout["reward"] for rollout in group]
        spreads.append(max(rewards) - min(rewards))
    expected["reward_range"] = fmean(spreads)
    expected["no_signal"] = fmean(spread == 0 for spread in spreads)
    assert {name: record[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_the_losses_are_of_what_ended_and_of_what_is_decided(by_hand):
    record, (tie, *decided) = by_hand
    terms = {"grpo_loss": [], "bt_loss": [], "bt_accuracy": [], "loss": []}
    for pair in (tie, *decided):
        learnt = [rollout["advantage"] for group in pair for rollout in group if ended(rollout)]
        if learnt:
            terms["grpo_loss"].append(-fmean(learnt))  # ρ is 1
        if pair is not tie:
            margins = torch.tensor([w["score"] - l["score"] for w, l in zip(*pair, strict=True)])
            terms["bt_loss"].append(-F.logsigmoid(margins).mean().item())
            terms["bt_accuracy"].append((margins > 0).float().mean().item())
        if learnt or pair is not tie:
            grpo = -fmean(learnt) if learnt else 0.0
            bt = 0.0 if pair is tie else terms["bt_loss"][-1]
            terms["loss"].append(grpo + BT_WEIGHT * bt)
    for name, values in terms.items():
        assert record[name] == (pytest.approx(fmean(values), rel=1e-4, abs=1e-5) if values else None), name
    some_ended = record["truncated"] < 1
    assert (record["kl"], record["clip_fraction"]) == ((0, 0) if some_ended else (None, None))
    assert record.keys() - {"step"} == FIGURES["rl"] - (set() if some_ended else {"ratio_max", "logp_gap"})


def test_the_runs_by_hand_show_all_that_there_is_to_see(by_hand):
    record, pairs = by_hand
    if record["truncated"] == 1:
        return
    for pair in pairs:
        in_pair = [ended(rollout) for group in pair for rollout in group]
        assert 0 < sum(in_pair) < len(in_pair)
    assert abs(record["grpo_loss"]) > 0.05  # it would be 0, were all learnt
    assert 0 < record["bt_accuracy"] < 1


# ------------------------------------------------------------------------------------------------------------
# The limit


def test_a_limit_that_one_rank_passes_ends_both(world_dir, tmp_path):
    """The file has twelve pairs: one has a missing video, and one is a tie, which stage 1 does not use."""
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 100)
    train = write_pairs(tmp_path / "pairs.jsonl", STEPS["coldstart"], world_dir, tmp_path / "broken.mp4")
    more = json.loads(train.read_text().splitlines()[0])
    tie = more | {"preference": "tie"}
    missing = more | {"video_a": str(tmp_path / "missing.mp4")}
    with train.open("a") as file:
        file.write(json.dumps(tie) + "\n" + json.dumps(missing) + "\n")
    ended = run_ranks(2, "coldstart.py", *STAGE1, *COMMON, "--train", train, "--out", tmp_path / "out",
                      "--batch-size", 5, "--max-skipped", 0.1, check=False)
    for done in ended:
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "2 of 12 pairs have videos that cannot be read, more than --max-skipped 0.1" in done.stderr
    first, second = lines_of(tmp_path / "out/skipped.jsonl")
    assert first == {"row": 12, "videos": [str(tmp_path / "missing.mp4")], "error": "missing"}
    assert str(tmp_path / "broken.mp4") in second["videos"]
    assert not figures(tmp_path / "out")


def test_two_pairs_that_miss_one_video_are_two(tmp_path):
    """In the file, and for --max-skipped."""
    pairs = Pairs(tmp_path / "pairs.jsonl")
    pairs += ["a pair"] * 2
    pairs.left_out = [{"row": row, "reason": "missing", "detail": "none.mp4"} for row in (1, 3)]
    Skipped(tmp_path / "skipped.jsonl", pairs, 0.5)
    assert [record["row"] for record in lines_of(tmp_path / "skipped.jsonl")] == [1, 3]
    with pytest.raises(DataError, match="2 of 4 pairs"):
        Skipped(tmp_path / "skipped.jsonl", pairs, 0.49)


def test_a_pair_that_cannot_be_read_is_one_however_often_it_is_met(tmp_path):
    """In one batch, as over an epoch's end, and in another epoch; with another prompt it is another."""
    pairs = Pairs(tmp_path / "pairs.jsonl")
    pairs += ["a pair"] * 4
    skipped = Skipped(tmp_path / "skipped.jsonl", pairs, 0.5)
    one = {"videos": ["a.mp4", "b.mp4"], "prompts": ["p", "p"], "error": "a.mp4: not a video"}
    other = one | {"prompts": ["q", "q"]}
    skipped.add([one, dict(one), other])
    skipped.add([dict(other), dict(one)])
    assert lines_of(tmp_path / "skipped.jsonl") == [one, other]
