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


def test_parts_of_bt_loss_add_up_to_the_whole():
    r_w, r_l = torch.tensor(rng.normal(size=(2, 9, 4)))
    whole = bt_loss(r_w, r_l)
    parts = [bt_loss(r_w[rows], r_l[rows], 9 * 4) for rows in ([0, 1, 2], [3], [4, 5, 6, 7, 8])]
    close(sum(parts), whole)


@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_a_pair_of_weight_0_is_left_out_of_bt_loss(shape):
    r_w, r_l = (torch.tensor(x, requires_grad=True) for x in rng.normal(size=(2, *shape)))
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]).double().view(5, *[1] * (len(shape) - 1))
    kept = [0, 2, 3]
    count = 3 * math.prod(shape[1:])
    loss = bt_loss(r_w, r_l, count, weight)
    close(loss.item(), bt_loss(r_w[kept], r_l[kept]).item())
    loss.backward()
    assert not r_w.grad[[1, 4]].any() and not r_l.grad[[1, 4]].any() and r_w.grad[kept].all()


def reference_grpo(logps, old, ref, advantages, mask, low, high, beta, loss_mean="cot", dual_clip=None):
    """The formula, one token at a time."""
    B, G, C = logps.shape
    of_cots, of_tokens = [], []
    for b in range(B):
        for g in range(G):
            terms = []
            for k in range(C):
                if mask[b, g, k]:
                    rho, A = math.exp(logps[b, g, k] - old[b, g, k]), advantages[b, g]
                    kl = math.exp(ref[b, g, k] - logps[b, g, k]) - (ref[b, g, k] - logps[b, g, k]) - 1
                    term = min(rho * A, min(max(rho, 1 - low), 1 + high) * A)
                    if dual_clip and A < 0:
                        term = max(term, dual_clip * A)
                    terms.append(term - beta * kl)
            of_cots.append(sum(terms) / len(terms) if terms else 0.0)
            of_tokens += terms
    if loss_mean == "cot":
        return -sum(of_cots) / (B * G)
    return -sum(of_tokens) / (len(of_tokens) if loss_mean == "token" else B * G * C)


def random_grpo(shape, spread=1.0):
    """logps, old_logps, ref_logps, advantages and mask, one CoT of them empty."""
    logps, old, ref = -abs(rng.normal(size=(3, *shape))) * spread
    advantages, mask = rng.normal(size=shape[:2]), rng.random(shape) < 0.7
    mask[0, 0] = False
    return logps, old, ref, advantages, mask


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (4, 8, 16)])
@pytest.mark.parametrize(("low", "high", "beta"), [(0.2, 0.2, 0.1), (0.2, 0.3, 1e-5), (0.1, 0.4, 0.0)])
def test_grpo_loss(shape, low, high, beta):
    arrays = random_grpo(shape)
    loss, figures = grpo_loss(*map(torch.tensor, arrays), clip_low=low, clip_high=high, beta=beta)
    close(loss, reference_grpo(*arrays, low, high, beta))
    assert all(math.isfinite(value) and value >= 0 for value in figures.values())


@pytest.mark.parametrize("loss_mean", ["cot", "token", "constant"])
@pytest.mark.parametrize("dual_clip", [None, 1.5, 3.0])
def test_grpo_loss_by_other_means_and_clipped_twice(loss_mean, dual_clip):
    arrays = random_grpo((4, 8, 16), spread=3.0)
    loss, _ = grpo_loss(*map(torch.tensor, arrays), 0.2, 0.3, 0.01, loss_mean, dual_clip)
    close(loss, reference_grpo(*arrays, 0.2, 0.3, 0.01, loss_mean, dual_clip))
    others = [(mean, dual) for mean in ("cot", "token", "constant") for dual in (None, 1.5, 3.0)]
    others.remove((loss_mean, dual_clip))  # none of which would give the same
    assert all(abs(loss - reference_grpo(*arrays, 0.2, 0.3, 0.01, *other)) > 1e-3 for other in others)


def test_a_second_clip_bounds_what_a_bad_rollout_can_cost():
    """ρ = e⁵, A = −2: the objective is −2 e⁵ without it, −2 · 3 with it, and has no gradient then."""
    logps = torch.tensor([[[0.0]]], dtype=torch.double, requires_grad=True)
    rest = (logps.detach() - 5, None, torch.tensor([[-2.0]]).double(), torch.tensor([[[True]]]))
    close(grpo_loss(logps, *rest, beta=0.0)[0].item(), 2 * math.exp(5))
    loss, _ = grpo_loss(logps, *rest, beta=0.0, dual_clip=3.0)
    loss.backward()
    assert loss.item() == 6 and logps.grad.item() == 0
    good = (rest[0], None, -rest[2], rest[3])  # a good one is bounded by the first clip
    close(grpo_loss(logps, *good, beta=0.0, dual_clip=3.0)[0].item(), -2 * 1.2)


@pytest.mark.parametrize("loss_mean", ["cot", "token", "constant"])
def test_micro_batches_of_grpo_add_up_to_the_whole(loss_mean):
    arrays = [torch.tensor(x) for x in random_grpo((6, 4, 9))]
    arrays[0].requires_grad_(True)
    mask = arrays[-1]
    whole, _ = grpo_loss(*arrays, beta=0.1, loss_mean=loss_mean)
    (gradient,) = torch.autograd.grad(whole, arrays[0])
    count = {"cot": 6 * 4, "token": int(mask.sum()), "constant": 6 * 4 * 9}[loss_mean]
    parts = []
    for rows in ([0, 1, 2], [3], [4, 5]):
        some = [x[rows] for x in arrays]
        longest = int(some[-1].any(0).any(0).nonzero().max()) + 1  # no more columns than they need
        some = [x[..., :longest] if x.ndim == 3 else x for x in some]
        parts.append(grpo_loss(*some, beta=0.1, loss_mean=loss_mean, count=count)[0])
    close(sum(parts).item(), whole.item())
    close(torch.autograd.grad(sum(parts), arrays[0])[0], gradient)


def test_what_is_left_out_of_the_mask_counts_in_no_mean_but_the_constant():
    """A rollout that is cut off, say: the rest is as if it had never been, but for 1/G."""
    arrays = [torch.tensor(x) for x in random_grpo((2, 3, 5))]
    arrays[-1][:] = True
    arrays[-1][:, 2] = False
    without = [x[:, :2] for x in arrays]
    for loss_mean, share in (("cot", 2 / 3), ("token", 1), ("constant", 2 / 3)):
        found, expected = (grpo_loss(*x, loss_mean=loss_mean)[0] for x in (arrays, without))
        close(found, share * expected)
    found = grpo_loss(*arrays, loss_mean="cot", count=4)[0]  # as rl.py counts
    close(found, grpo_loss(*without, loss_mean="cot")[0])


def test_the_figures_of_grpo_are_means_over_tokens():
    logps, old, ref, advantages, mask = random_grpo((3, 4, 7))
    _, figures = grpo_loss(*map(torch.tensor, (logps, old, ref, advantages, mask)), beta=0.1)
    clipped, kl = [], []
    for index in zip(*np.nonzero(mask)):
        rho, A = math.exp(logps[index] - old[index]), advantages[index[:2]]
        clipped.append(A > 0 and rho > 1.2 or A < 0 and rho < 0.8)
        kl.append(math.exp(ref[index] - logps[index]) - (ref[index] - logps[index]) - 1)
    close(figures["clip_fraction"], np.mean(clipped), 1e-6)
    close(figures["kl"], np.mean(kl), 1e-6)
    assert 0.1 < np.mean(clipped) < 0.9


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


def test_group_advantages_without_the_division():
    rewards = rng.random((5, 8))
    rewards[2] = 0.4  # without signal
    expected = rewards - rewards.mean(1, keepdims=True)
    close(group_advantages(torch.tensor(rewards), divide_by_std=False), expected)
    assert not group_advantages(torch.tensor(rewards), divide_by_std=False)[2].any()


@pytest.mark.parametrize("rewards", [[[0.3]], [[0.7] * 8], [[0.0] * 4], [[0.1 + 0.2, 0.3, 0.3]]])
def test_groups_without_signal_have_no_advantage(rewards):
    for dtype in (torch.float32, torch.float64):
        assert (group_advantages(torch.tensor(rewards, dtype=dtype)) == 0).all()


@pytest.mark.parametrize(("n", "expected"),
                         [(0, 0), (500, 0), (501, 1 / 1500), (1250, 0.5), (2000, 1), (9999, 1)])
def test_length_reward(n, expected):
    close(length_reward(n), expected)


@pytest.mark.parametrize("bounds", [(60, 60), (60, 59), (0, 0), (10, 30, 29), (10, 30, 5)])
def test_the_length_reward_refuses_bounds_that_make_no_sense(bounds):
    with pytest.raises(ValueError, match="R_l needs low < high ≤ excess, not"):
        length_reward(20, *bounds)


@pytest.mark.parametrize(("n", "expected"), [(20, 0.5), (30, 1), (40, 1), (50, 0.5), (60, 0), (99, 0)])
def test_length_reward_falls_from_the_excess_on(n, expected):
    close(length_reward(n, low=10, high=30, excess=40), expected)


GOLD = {"subject": 2, "dynamics": 1, "camera": "N/A", "environment": 2, "style": 0}
ANSWER = ('{"dimensional_scores": {"subject": 2, "dynamics": 1, "camera": "N/A", "environment": 0, '
          '"style": 1}, "overall_score": 3.4}')


def test_quality_reward_counts_exact_matches():
    assert quality_reward(f"<think>it looks right</think><answer>{ANSWER}</answer>", GOLD) == 3 / 5
    assert quality_reward(f"<think>so</think><answer>{ANSWER.replace('2', '3', 1)}</answer>", GOLD) == 0
    assert quality_reward("no answer", GOLD) == 0
    only = {"camera": "N/A", "style": 2}
    assert quality_reward(f"<think>it looks right</think><answer>{ANSWER}</answer>", only) == 1 / 2


def test_quality_needs_na_to_match():
    without = ANSWER.replace('"N/A"', "0")
    assert quality_reward(f"<answer>{without}</answer>", GOLD) == 2 / 5


@pytest.mark.parametrize(("text", "kept"), [
    ("<think>it looks right</think><answer>{}</answer>", True),
    ("  <think>\nit looks right\n</think>\n\n<answer>\n```json\n{}\n```\n</answer>\n", True),
    ("<think> </think><answer>{}</answer>", False),
    ("<answer>{}</answer>", False),
    ("<answer>{}</answer><think>it looks right</think>", False),
    ("<think>it looks right</think><answer>{}</answer> done", False),
    ("well, <think>it looks right</think><answer>{}</answer>", False),
    ("<think>it looks right</think>so<answer>{}</answer>", False),
    ("<think>it looks right</think><answer>{}</answer><answer>{}</answer>", False),
    ("<think>it looks right</think><think>b</think><answer>{}</answer>", False),
    ("<think>it looks right<answer>{}</answer></think><answer>{}</answer>", False),
    ("<think>it looks right</think><answer>{}", False),
    ("<think>it looks right</think><answer>{}{}</answer>", False),
    ("<think>it looks right</think><answer>[{}]</answer>", False),
])
def test_format_reward(text, kept):
    assert format_reward(text.replace("{}", ANSWER)) == float(kept)


@pytest.mark.parametrize("value",
                         ["3", "-1", "true", "[2]", "NaN", "null", '"3"', '"2.0"', '" 2"', '"n/a"', "1.5"])
def test_format_reward_checks_each_sub_score(value):
    answer = ANSWER.replace('"subject": 2', f'"subject": {value}')
    assert format_reward(f"<think>it looks right</think><answer>{answer}</answer>") == 0


@pytest.mark.parametrize("value", ["0.9", "5.1", "NaN", "Infinity", "null", '"3"', "true"])
def test_format_reward_checks_the_overall_score(value):
    answer = ANSWER.replace("3.4", value)
    assert format_reward(f"<think>it looks right</think><answer>{answer}</answer>") == 0


@pytest.mark.parametrize("answer", [
    ANSWER.replace("3.4", "1"), ANSWER.replace("3.4", "5"), ANSWER.replace(', "overall_score": 3.4', ""),
    ANSWER.replace('"subject": 2', '"subject": "2"'), ANSWER.replace('"style": 1', '"style": 1.0'),
    ANSWER[:-1] + ', "why": "it moves"}'])
def test_the_format_asks_for_no_more_than_the_paper_does(answer):
    """One word of thought is enough, the overall score is free, and numbers may be quoted."""
    text = f"<think>so</think><answer>{answer}</answer>"
    assert format_reward(text) == 1 and quality_reward(text, GOLD) == 3 / 5


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


def drawn_by_numpy(logits, uniform, top_p=1.0):
    """Inverse CDF, plainly: the first token at which the mass up to it is above the uniform number."""
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    if top_p < 1:
        kept, mass = set(), 0.0
        for token in np.argsort(-probs):  # the smallest set of mass top_p
            if mass >= top_p:
                break
            kept.add(token)
            mass += probs[token]
        probs = np.where([token in kept for token in range(len(probs))], probs, 0.0)
    return int(np.searchsorted(np.cumsum(probs) / probs.sum(), uniform, side="right"))


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_what_is_drawn_is_the_inverse_of_the_cdf(top_p):
    logits, uniform = rng.normal(size=(50, 4, 30)) * 2, rng.random((50, 4))
    found = draw(torch.tensor(logits), torch.tensor(uniform), top_p)
    assert found.shape == (50, 4) and found.dtype == torch.long
    expected = [[drawn_by_numpy(logits[i, j], uniform[i, j], top_p) for j in range(4)] for i in range(50)]
    assert found.tolist() == expected
    if top_p == 0.01:
        assert found.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_uniforms_draw_the_first_and_the_last_that_can_be(dtype):
    below_one = torch.nextafter(torch.tensor(1.0, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    logits = torch.tensor([-math.inf, -math.inf, 1.0, -math.inf, 3.0, 0.0, -math.inf], dtype=dtype)
    for top_p, last in ((1.0, 5), (0.9, 4)):
        ends = torch.stack([torch.zeros((), dtype=dtype), below_one])
        assert draw(logits.expand(2, 7), ends, top_p).tolist() == [2, last]
    assert draw(logits, torch.tensor(0.0, dtype=dtype), 0.5) == 4  # alone in the smallest set


def test_a_large_vocabulary_is_drawn_from_without_rounding():
    """A token weighs some 1e-5 there, and numbers near 1 in float32 are 6e-8 apart."""
    logits = torch.tensor(rng.normal(size=151_936), dtype=torch.float32)
    cdf = np.cumsum(logits.softmax(-1).double().numpy())
    cdf /= cdf[-1]
    tokens = rng.integers(0, 151_935, 20)
    uniform = np.concatenate([cdf[tokens] - 1e-10, cdf[tokens] + 1e-10, [0.0, 1 - 2**-24, 1 - 2**-53]])
    found = draw(logits.expand(43, -1), torch.tensor(uniform)).tolist()
    assert found[:40] == [*tokens, *(tokens + 1)] and found[40] == 0
    assert found[41] <= found[42] == 151_935 and cdf[found[41]] > 1 - 2**-24


def test_sampling_follows_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    uniform = torch.rand(40000, generator=torch.Generator().manual_seed(0))
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.7)):
        drawn = draw(logits.expand(40000, 4) / temperature, uniform, top_p)
        probs = (logits / temperature).softmax(-1)
        if top_p < 1:
            probs = torch.where(torch.tensor([True, True, False, False]), probs, 0.0)  # 0.64 + 0.24 ≥ 0.7
            probs = probs / probs.sum()
        share = torch.bincount(drawn, minlength=4) / 40000
        assert ((share - probs).abs() <= 5 * (probs * (1 - probs) / 40000).sqrt()).all()  # 5 standard errors


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
