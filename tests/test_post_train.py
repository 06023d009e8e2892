"""The generator of toy/post_train.py: what it chooses is drawn, and it follows the reward it is given."""

import math

import numpy as np
import post_train
import pytest
import torch
import world


def test_a_clip_is_the_options_that_were_chosen_for_it():
    policy = post_train.Generator()
    asked = post_train.requests(0, 4)
    chosen = policy.draw(asked, 3, torch.Generator().manual_seed(0))
    assert chosen.shape == (4, 3, 12)
    for one in chosen.flatten(0, 1):
        assert post_train.to_choices(post_train.to_clip(one)) == one.tolist()


def test_log_probabilities_are_those_of_the_draws():
    """Of each decision they sum to 1 over its options, and draws come as often as they say."""
    torch.manual_seed(1)
    policy, asked = post_train.Generator(), post_train.requests(1, 1)
    sizes = [5, 4, 6, 5, 5, 3, 5, 5, 5, 5, 5, 5]
    chosen = policy.draw(asked, 4000, torch.Generator().manual_seed(2))[0]
    for i, size in enumerate(sizes):
        every = torch.zeros(1, size, 12, dtype=torch.long)
        every[0, :, i] = torch.arange(size)
        odds = policy.logps(asked, every)[0, :, i].exp()
        assert odds.sum().item() == pytest.approx(1, abs=1e-5)
        seen = torch.bincount(chosen[:, i], minlength=size) / 4000
        assert (seen - odds).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_it_begins_as_good_as_the_middling_generator():
    policy = post_train.mediocre(0)
    rng = np.random.default_rng(0)
    asked = post_train.requests(99, 500)
    skill = world.GENERATORS["train"]["basalt"].skill
    wanted = np.mean([world.quality(scene, world.draw_clip(scene, skill, "none", rng)) for scene in asked])
    found = post_train.truth(policy, 0)
    assert abs(found["quality"] - wanted) < 0.05 and abs(found["vignette"] - 0.2) < 0.08


@pytest.mark.parametrize("method", ["GRPO", "DPO"])
@pytest.mark.parametrize("what", ["quality", "vignette"])
def test_it_becomes_what_is_rewarded(method, what, monkeypatch):
    def reward(model, asked, chosen, think, seed):
        clips = [[post_train.to_clip(one) for one in some] for some in chosen]
        if what == "vignette":
            return torch.tensor([[float(clip.signature == "vignette") for clip in some] for some in clips])
        return torch.tensor([[world.quality(scene, clip) for clip in some]
                             for scene, some in zip(asked, clips)])

    monkeypatch.setattr(post_train, "score", reward)
    records = list(post_train.train(method, None, True, 0, 40))
    assert [record["step"] for record in records] == list(range(41))
    gained = records[-1][what] - records[0][what]
    other = "vignette" if what == "quality" else "quality"
    assert gained > (0.08 if what == "quality" else 0.3)
    assert records[-1][other] - records[0][other] < gained / 2


def test_dpo_by_hand():
    torch.manual_seed(3)
    policy, reference, asked = post_train.Generator(), post_train.Generator(), post_train.requests(3, 2)
    chosen = policy.draw(asked, 3, torch.Generator().manual_seed(4))
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]])
    total = 0.0
    for b, (best, worst) in enumerate(((1, 0), (0, 2))):
        gained = [sum((policy.logps(asked, chosen) - reference.logps(asked, chosen))[b, g].tolist())
                  for g in (best, worst)]
        total += math.log(1 + math.exp(-0.5 * (gained[0] - gained[1])))
    loss = post_train.dpo(policy, reference, asked, chosen, scores)
    assert loss.item() == pytest.approx(total / 2, rel=1e-4)
