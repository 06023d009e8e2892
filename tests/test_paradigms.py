"""What DeScore is compared with in experiments/: losses, rewards against plain sums, whole runs."""

import itertools
import json
import math

import claims
import numpy as np
import paradigms
import pytest
import results
import torch
import world
from conftest import ROOT, TOY_VIDEO
from launch import run

from data import parse_cot
from support.batches import read_ahead

θ = 5.0


@pytest.mark.parametrize("d", [-3.0, 0.0, 0.7, 4.0])
def test_bradley_terry_with_ties_is_a_distribution_and_its_logarithm(d):
    win = math.exp(d) / (math.exp(d) + θ)
    lose = 1 / (1 + θ * math.exp(d))
    tie = (θ**2 - 1) * math.exp(d) / ((math.exp(d) + θ) * (θ * math.exp(d) + 1))
    assert win + lose + tie == pytest.approx(1)
    loss = paradigms.ties_loss(torch.tensor([d, -d, d, -d]), torch.tensor([False, False, True, True]), θ)
    assert loss.tolist() == pytest.approx([-math.log(p) for p in (win, lose, tie, tie)], rel=1e-5)


def test_pairwise_rewards_count_whom_a_rollout_beats():
    nan = math.nan
    written = torch.tensor([[[3.0, 2.0, nan], [2.0, 4.0, 2.5]], [[nan, nan, nan], [1.0, nan, 2.0]]])
    wanted = [[[2 / 3, 1 / 6, 0], [(1 + 0.5 + 0) / 3, 0, 1 / 3]], [[0, 0, 0], [0, 0, 0]]]
    # A loser's rollout is judged by the winner's: one that cannot be read is beaten by none of them.
    assert paradigms.pairwise_rewards(written)[0, 0].tolist() == pytest.approx(wanted[0][0])
    for pair in range(2):
        for i, j in itertools.product(range(2), range(3)):
            own, others = written[pair, i, j].item(), written[pair, 1 - i].tolist()
            total = 0.0
            for other in others:
                if math.isnan(own):
                    continue
                ahead = own - other if i == 0 else other - own
                total += 1.0 if math.isnan(other) or ahead > 0 else 0.5 if ahead == 0 else 0.0
            assert paradigms.pairwise_rewards(written)[pair, i, j].item() == pytest.approx(total / 3)


COT = ("<think>\nsubject: asked red circle, seen red yes, circle yes, so 2\ndynamics: not asked, so N/A\n"
       "camera: asked zooms in, seen pans left no, so 0\nenvironment: not asked, so N/A\n"
       "style: not asked, so N/A\n</think>\n<answer>\n"
       '{"dimensional_scores":{"subject":2,"dynamics":"N/A","camera":0,"environment":"N/A","style":"N/A"}}'
       "\n</answer>")


def test_what_a_generative_model_is_to_write():
    text = paradigms.to_write(COT, world.DIMENSIONS, think=True)
    overall = 1 + 2 * (2 * 2 + 1 * 0) / 3  # 3.67
    assert paradigms.written_score(text) == 37 == round(10 * overall)
    assert text.startswith(COT) and parse_cot(text, world.DIMENSIONS) == parse_cot(COT, world.DIMENSIONS)
    alone = paradigms.to_write(COT, world.DIMENSIONS, think=False)
    assert paradigms.written_score(alone) == 37 and "<think>" not in alone
    for text in (COT, "no score", " so 34 or so", " so 51", " so 9", ""):
        assert math.isnan(paradigms.written_score(text))


@pytest.mark.parametrize("count", range(1, 6))
def test_falsified_sub_scores_are_so_many_and_said_twice(count):
    false = claims.falsified(COT, count, np.random.default_rng(count))
    before, after = (parse_cot(cot, world.DIMENSIONS)["dimensional_scores"] for cot in (COT, false))
    assert sum(before[name] != after[name] for name in before) == count
    for name, value in after.items():
        (line,) = [line for line in false.splitlines() if line.startswith(f"{name}:")]
        assert line.endswith(f", so {value}")


@pytest.mark.slow
@pytest.mark.parametrize("cots", [[COT + " so 34", "subject: a blue"], None])
def test_the_expectation_is_over_all_scores_that_can_be_written(cots, model, keys):
    batch, _ = next(read_ahead(model.processor, [[keys[:1], keys[1:2]]]))
    likeliest, expected = paradigms.expected_scores(model, batch, cots)
    values = list(range(10, 51))
    for row, before in enumerate([COT, "subject: a blue"] if cots else ["", ""]):
        alone, logps = batch_of(model, keys[row]), []
        for value in values:  # one at a time, in one chain with what stands before it
            ids = [*model.processor.encode(before), *model.processor.encode(f" so {value}"), model.eos]
            mask = torch.ones(1, 1, len(ids), dtype=torch.bool)
            logp, _ = model.group(alone, torch.tensor([[ids]]), mask)
            logps.append(logp[0, 0, len(model.processor.encode(before)):].sum().item())
        odds = np.exp(np.array(logps) - max(logps))
        assert expected[row].item() == pytest.approx(np.sum(odds * values) / odds.sum(), abs=1e-4)
        assert likeliest[row].item() == pytest.approx(values[int(np.argmax(logps))])


def batch_of(model, key):
    return next(read_ahead(model.processor, [[[key]]]))[0]


def test_an_interval_holds_the_mean_and_shrinks_with_more_pairs():
    rng = np.random.default_rng(0)
    few, many = ({seed: (rng.random(count) < 0.7).astype(float) for seed in range(3)} for count in (50, 5000))
    for samples in (few, many):
        mean, low, high = results.interval(samples)
        assert low < mean < high and mean == np.concatenate(list(samples.values())).mean()
        spread = 1.96 * (0.21 / sum(map(len, samples.values()))) ** 0.5
        assert high - low > 1.6 * spread  # at least that of the pairs alone
    assert np.ptp(results.interval(many)[1:]) < 0.3 * np.ptp(results.interval(few)[1:])
    # Of 27 draws of three seeds one has only the worst, one only the best: 0.037 each.
    assert results.interval({seed: np.full(4, seed / 2) for seed in range(3)}) == (0.5, 0.0, 1.0)


def overall_tenths(scores):
    """The weighted mean of sub-scores, 1 to 5, in tenths."""
    weights = {name: world.DIMENSIONS[name] for name, value in scores.items() if value != "N/A"}
    return round(10 + 20 * sum(w * scores[name] for name, w in weights.items()) / sum(weights.values()))


@pytest.mark.parametrize("think", [True, False])
def test_a_generative_way_learns_its_cots_and_its_scores_by_a_mean_each(think, model, world_dir, tmp_path):
    rows = [json.loads(line) for line in (world_dir / "train_cots.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["preference"] != "tie"][:3]
    encode, of_cots, of_scores = model.processor.encode, [], []
    for row in rows:
        for side in "ab":
            row[f"video_{side}"] = str(world_dir / row[f"video_{side}"])
            score = [*encode(f" so {overall_tenths(row[f'scores_{side}'])}"), model.eos]
            cot = encode(row[f"cot_{side}"]) if think else []
            batch, _ = next(read_ahead(model.processor, [[[(row[f"video_{side}"], row["prompt"])]]]))
            ids = torch.tensor([[[*cot, *score]]])
            logps, _ = model.group(batch, ids, torch.ones_like(ids, dtype=torch.bool))
            of_cots += (-logps[0, 0, :len(cot)]).tolist()
            of_scores += (-logps[0, 0, len(cot):]).tolist()
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("experiments/paradigms.py", "supervise", "--train", tmp_path / "pairs.jsonl", "--think", think,
        "--model", ROOT / "toy/backbone", "--epochs", 1, "--batch-size", 3, "--out", tmp_path / "out",
        "--workers", 0, *TOY_VIDEO, "--eval-before", "false")
    (record,) = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()
                 if '"loss"' in line]
    wanted = np.mean(of_scores) + (np.mean(of_cots) if think else 0.0)
    assert record["loss"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_every_paradigm_trains_and_what_it_makes_is_judged(world_dir, tmp_path):
    common = ["--lora-rank", 2, "--lr", 1e-3, "--workers", 0, *TOY_VIDEO, "--eval-before", "false"]
    first = ["--train", world_dir / "train_cots.jsonl", "--model", ROOT / "toy/backbone", "--epochs", 1,
             "--batch-size", 4, *common]
    for way, more in (("ties", []), ("supervise", []), ("supervise", ["--think", "false"])):
        out = tmp_path / f"{way}{len(more)}"
        run("experiments/paradigms.py", way, "--out", out, *first, *more)
        losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()
                  if '"loss"' in line]
        assert losses and all(map(math.isfinite, losses))
    second = ["--train", world_dir / "train.jsonl", "--steps", 1, "--batch-size", 2, "--updates", 1,
              "--group-size", 2, "--max-new-tokens", 24, *common]
    out = tmp_path / "pairwise"
    run("experiments/paradigms.py", "pairwise", "--out", out, "--model", tmp_path / "supervise0", *second)
    (record,) = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
                 if '"grpo_loss"' in line]
    assert math.isfinite(record["grpo_loss"]) and record["grad_norm"] >= 0


@pytest.mark.parametrize("way", ["expected", "supervise", "pairwise"])
def test_nothing_but_ties_teaches_nothing(way, world_dir, tmp_path):
    rows = [json.loads(line) | {"preference": "tie"} for line in (world_dir / "train_cots.jsonl").open()]
    for row in rows:
        row |= {side: str(world_dir / row[side]) for side in ("video_a", "video_b")}
    (tmp_path / "ties.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    done = run("experiments/paradigms.py", way, "--train", tmp_path / "ties.jsonl", "--model",
               ROOT / "toy/backbone", "--out", tmp_path / "out", *TOY_VIDEO, "--lora-rank", 4, check=False)
    assert done.returncode == 1 and "nothing but ties" in done.stderr and "Traceback" not in done.stderr
