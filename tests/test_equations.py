"""Every equation against an independent formula, in float64."""

import math

import numpy as np
import pytest
import torch

from coldstart import bt_loss, mask_pairs, order
from data import overall_score
from infer import accuracy_with_ties, accuracy_without_ties
from model import draw
from rl import format_reward, group_advantages, grpo_loss, length_reward, quality_reward

rng = np.random.default_rng(0)


def close(value, expected, tolerance=1e-12):
    assert np.allclose(np.asarray(value), expected, rtol=tolerance, atol=tolerance), (value, expected)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 4)])
def test_bt_loss(shape):
    r_w, r_l = rng.normal(size=(2, *shape)) * 3
    close(bt_loss(torch.tensor(r_w), torch.tensor(r_l)), np.mean(np.log1p(np.exp(-(r_w - r_l)))))


def test_bt_loss_is_finite_where_a_naive_log_is_not():
    loss = bt_loss(torch.tensor([-500.0], dtype=torch.double), torch.tensor([500.0], dtype=torch.double))
    close(loss, 1000.0)


def reference_grpo(logps, old, ref, advantages, mask, low, high, beta):
    """The formula, one token at a time."""
    B, G, C = logps.shape
    total = 0.0
    for b in range(B):
        for g in range(G):
            terms = []
            for k in range(C):
                if mask[b, g, k]:
                    rho, A = math.exp(logps[b, g, k] - old[b, g, k]), advantages[b, g]
                    kl = math.exp(ref[b, g, k] - logps[b, g, k]) - (ref[b, g, k] - logps[b, g, k]) - 1
                    terms.append(min(rho * A, min(max(rho, 1 - low), 1 + high) * A) - beta * kl)
            total += sum(terms) / len(terms) if terms else 0.0
    return -total / (B * G)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (4, 8, 16)])
@pytest.mark.parametrize(("low", "high", "beta"), [(0.2, 0.2, 0.1), (0.2, 0.3, 1e-5), (0.1, 0.4, 0.0)])
def test_grpo_loss(shape, low, high, beta):
    logps, old, ref = -abs(rng.normal(size=(3, *shape)))
    advantages, mask = rng.normal(size=shape[:2]), rng.random(shape) < 0.7
    mask[0, 0] = False  # an empty CoT
    tensors = [torch.tensor(x) for x in (logps, old, ref, advantages, mask)]
    loss, figures = grpo_loss(*tensors, clip_low=low, clip_high=high, beta=beta)
    close(loss, reference_grpo(logps, old, ref, advantages, mask, low, high, beta))
    assert all(math.isfinite(value) and value >= 0 for value in figures.values())


def test_grpo_gradient_at_ratio_one_is_the_policy_gradient():
    logps = torch.tensor(-abs(rng.normal(size=(2, 3, 4))), requires_grad=True)
    advantages, mask = torch.tensor(rng.normal(size=(2, 3))), torch.ones(2, 3, 4, dtype=torch.bool)
    grpo_loss(logps, logps.detach(), None, advantages, mask, beta=0.0)[0].backward()
    close(logps.grad, -(advantages[..., None] / 4 / 6).expand(2, 3, 4))


def test_grpo_ignores_what_stands_off_the_mask():
    logps = torch.tensor([[[-1.0, float("nan")]]], dtype=torch.double).nan_to_num(-99.0)
    mask = torch.tensor([[[True, False]]])
    one = grpo_loss(logps, logps * 0.9, logps * 0.8, torch.ones(1, 1).double(), mask, beta=0.1)[0]
    two = grpo_loss(logps[..., :1], logps[..., :1] * 0.9, logps[..., :1] * 0.8, torch.ones(1, 1).double(),
                    mask[..., :1], beta=0.1)[0]
    close(one, two)


def test_group_advantages():
    rewards = rng.random((5, 8))
    expected = (rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, ddof=1, keepdims=True)
    close(group_advantages(torch.tensor(rewards)), expected)


@pytest.mark.parametrize("rewards", [[[0.3]], [[0.7] * 8], [[0.0] * 4], [[0.1 + 0.2, 0.3, 0.3]]])
def test_groups_without_signal_have_no_advantage(rewards):
    for dtype in (torch.float32, torch.float64):
        assert (group_advantages(torch.tensor(rewards, dtype=dtype)) == 0).all()


@pytest.mark.parametrize(("n", "expected"),
                         [(0, 0), (500, 0), (501, 1 / 1500), (1250, 0.5), (2000, 1), (9999, 1)])
def test_length_reward(n, expected):
    close(length_reward(n), expected)


@pytest.mark.parametrize(("n", "expected"), [(20, 0.5), (30, 1), (40, 1), (50, 0.5), (60, 0), (99, 0)])
def test_length_reward_falls_from_the_excess_on(n, expected):
    close(length_reward(n, low=10, high=30, excess=40), expected)


GOLD = {"subject": 2, "dynamics": 1, "camera": "N/A", "environment": 2, "style": 0}
ANSWER = ('{"dimensional_scores": {"subject": 2, "dynamics": 1, "camera": "N/A", "environment": 0, '
          '"style": 1}, "overall_score": 3.4}')


def test_quality_reward_counts_exact_matches():
    assert quality_reward(f"<think>a</think><answer>{ANSWER}</answer>", GOLD) == 3 / 5
    assert quality_reward(f"<think>a</think><answer>{ANSWER.replace('2', '3', 1)}</answer>", GOLD) == 0
    assert quality_reward("no answer", GOLD) == 0
    only = {"camera": "N/A", "style": 2}
    assert quality_reward(f"<think>a</think><answer>{ANSWER}</answer>", only) == 1 / 2


def test_quality_needs_na_to_match():
    without = ANSWER.replace('"N/A"', "0")
    assert quality_reward(f"<answer>{without}</answer>", GOLD) == 2 / 5


@pytest.mark.parametrize(("text", "kept"), [
    ("<think>a</think><answer>{}</answer>", True),
    ("  <think>\na\n</think>\n\n<answer>\n```json\n{}\n```\n</answer>\n", True),
    ("<think> </think><answer>{}</answer>", False),
    ("<answer>{}</answer>", False),
    ("<answer>{}</answer><think>a</think>", False),
    ("<think>a</think><answer>{}</answer> done", False),
    ("well, <think>a</think><answer>{}</answer>", False),
    ("<think>a</think>so<answer>{}</answer>", False),
    ("<think>a</think><answer>{}</answer><answer>{}</answer>", False),
    ("<think>a</think><think>b</think><answer>{}</answer>", False),
    ("<think>a<answer>{}</answer></think><answer>{}</answer>", False),
    ("<think>a</think><answer>{}", False),
    ("<think>a</think><answer>{}{}</answer>", False),
    ("<think>a</think><answer>[{}]</answer>", False),
])
def test_format_reward(text, kept):
    assert format_reward(text.replace("{}", ANSWER)) == float(kept)


@pytest.mark.parametrize("value", ["3", "-1", "true", "[2]", "NaN", "null", '"2"', '"n/a"', "1.5"])
def test_format_reward_checks_each_sub_score(value):
    text = "<think>a</think><answer>" + ANSWER.replace('"subject": 2', f'"subject": {value}') + "</answer>"
    assert format_reward(text) == 0


@pytest.mark.parametrize("value", ["0.9", "5.1", "NaN", "Infinity", "null", '"3"', "true"])
def test_format_reward_checks_the_overall_score(value):
    assert format_reward("<think>a</think><answer>" + ANSWER.replace("3.4", value) + "</answer>") == 0


def test_overall_score_weighs_primary_dimensions_twice():
    close(overall_score(GOLD), 1 + 2 * (2 * 2 + 2 * 1 + 1 * 2 + 1 * 0) / 6)
    assert overall_score(dict.fromkeys(GOLD, "N/A")) is None
    assert overall_score(dict.fromkeys(GOLD, 2)) == 5
    assert overall_score(dict.fromkeys(GOLD, 0)) == 1


def test_accuracy_without_ties():
    human, margin = torch.tensor([1, -1, 0, 1, -1]), torch.tensor([0.5, 0.1, 3.0, 0.0, -2.0])
    assert accuracy_without_ties(human, margin) == 2 / 4  # a margin of 0 prefers nobody


@pytest.mark.parametrize("seed", range(30))
def test_accuracy_with_ties_is_the_best_over_all_thresholds(seed):
    draw = np.random.default_rng(seed)
    n = draw.integers(1, 60)
    human = draw.integers(-1, 2, n)
    margin = draw.integers(-4, 5, n) / 4  # many equal margins
    thresholds = [-1.0, *np.unique(abs(margin))]
    best = max(np.mean(np.where(abs(margin) <= t, 0, np.sign(margin)) == human if t >= 0 else
                       (np.sign(margin) == human) & (human != 0)) for t in thresholds)
    close(accuracy_with_ties(torch.tensor(human), torch.tensor(margin)), best)


def test_sampling_follows_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    noise = torch.empty(40000, 4).exponential_(generator=torch.Generator().manual_seed(0))
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.7)):
        drawn = draw(logits.expand(40000, 4), temperature, top_p, noise)
        probs = (logits / temperature).softmax(-1)
        if top_p < 1:
            probs = torch.where(torch.tensor([True, True, False, False]), probs, 0.0)  # 0.64 + 0.24 ≥ 0.7
            probs = probs / probs.sum()
        share = torch.bincount(drawn, minlength=4) / 40000
        assert ((share - probs).abs() <= 5 * (probs * (1 - probs) / 40000).sqrt()).all()  # 5 standard errors
    assert (draw(logits.expand(5, 4), 0.0, 1.0, None) == 0).all()


def test_pairs_are_masked_at_rate_p_and_by_the_seed_alone():
    masked = mask_pairs(20000, 0.3, seed=1, step=2)
    assert abs(np.mean(masked) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 20000)
    assert masked == mask_pairs(20000, 0.3, seed=1, step=2) != mask_pairs(20000, 0.3, seed=1, step=3)
    assert not any(mask_pairs(100, 0.0, 0, 0)) and all(mask_pairs(100, 1.0, 0, 0))


def test_every_pair_is_seen_once_an_epoch():
    seen = order(10, 3, seed=0)
    assert all(sorted(seen[i * 10:(i + 1) * 10]) == list(range(10)) for i in range(3))
    assert seen[:10] != seen[10:20]


def test_accuracy_with_ties_takes_a_million_pairs():
    human, margin = torch.randint(-1, 2, (1_000_000,)), torch.randn(1_000_000)
    assert 1 / 3 - 0.01 < accuracy_with_ties(human, margin) < 1 / 3 + 0.01  # nothing to be found in noise
