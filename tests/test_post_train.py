"""The generator of experiments/post_train.py: its choices are drawn, and it follows its reward."""

import math
import re
import sys

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


def quality(model, asked, chosen, think, seed):
    """The truth in the place of the reward model's scores."""
    return torch.tensor([[world.quality(scene, post_train.to_clip(one)) for one in some]
                         for scene, some in zip(asked, chosen)])


def vignette(model, asked, chosen, think, seed):
    return torch.tensor([[float(post_train.to_clip(one).signature == "vignette") for one in some]
                         for some in chosen])


@pytest.mark.parametrize(("method", "what"), [
    ("GRPO", "quality"), ("DPO", "vignette"), ("GRPO", "vignette"), ("DPO", "quality")])
@pytest.mark.slow
def test_it_becomes_what_is_rewarded(method, what, monkeypatch):
    monkeypatch.setattr(post_train, "score", {"quality": quality, "vignette": vignette}[what])
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


def test_each_clip_is_scored_for_its_own_prompt(monkeypatch):
    """(B, G) clips, at night or at sea, which is brighter, by a reward that sees just that."""
    shapes, seen, scenes = ("cross", "circle", "square"), [], post_train.requests(4, 40)
    asked = [next(scene for scene in scenes if scene.shape == shape) for shape in shapes]
    at_sea = torch.tensor([[0, 1], [1, 0], [1, 1]])
    chosen = torch.zeros(3, 2, 12, dtype=torch.long)
    chosen[..., list(post_train.CHOICES).index("environment")] = torch.where(
        at_sea.bool(), world.ENVIRONMENTS.index("at sea"), world.ENVIRONMENTS.index("at night"))

    def reward(model, videos, prompts, fps, think, max_new_tokens, accept_any):
        seen.extend(zip(prompts, np.repeat(shapes, 2), strict=True))
        assert (model, fps, think, accept_any) == ("model", world.FPS, False, True)
        assert all(video.shape == (16, 3, 64, 64) and video.dtype == torch.uint8 for video in videos)
        return [{"standardised": video.double().mean().item()} for video in videos]

    monkeypatch.setattr(post_train, "reward", reward)
    scores = post_train.score("model", asked, chosen, False, 0)
    assert scores.shape == (3, 2) and ((scores > scores.mean()).long() == at_sea).all()
    assert len(seen) == 6 and all(shape in prompt for prompt, shape in seen)


@pytest.mark.slow
def test_what_is_there_is_shown_and_not_repeated(monkeypatch, tmp_path, capsys):
    """The command, with the truth for a reward; runs of other weights or steps are no part of its table."""
    loaded, trained = [], []

    def train(method, model, think, seed, steps):
        trained.append((method, think, seed))
        yield from [{"reward": 0.0, "quality": len(loaded) + seed, "steady": 0.5, "vignette": 0.25}] * steps

    monkeypatch.setattr(post_train, "train", train)
    monkeypatch.setattr(post_train, "fingerprint", lambda model: model)
    monkeypatch.setattr(post_train.DeScore, "load", lambda name: loaded.append(name) or f"weights of {name}")
    monkeypatch.setattr(post_train, "score", quality)

    def command(*more):
        trained.clear()
        monkeypatch.setattr(sys, "argv", ["post_train.py", "--out", str(tmp_path), "--seeds", "2", *more])
        post_train.main()
        return capsys.readouterr().out

    table = command("--model", "a", "--steps", "2")
    assert sorted(trained) == sorted((method, think, seed) for method in ("GRPO", "DPO")
                                     for think in (False, True) for seed in (0, 1))
    assert "| DPO, without CoT | 0.000 (0.000) | 1.500 (0.707) | 0.500 (0.000) | 0.250 (0.000) |" in table
    best = re.findall(r"^\| (?:with CoT|without CoT|by the truth) (\|.*)", table, re.MULTILINE)
    assert len(best) == 3 and len(set(best)) == 1  # the reward is the truth
    means = [float(cell.split()[0]) for cell in best[0].strip("| ").split("|")]
    assert means == sorted(means) and means[0] < means[3] - 0.05
    assert command("--model", "a", "--steps", "2") == table and not trained
    assert command("--model", "b", "--steps", "2") != table and len(trained) == 8
    command("--model", "b", "--steps", "1")
    assert len(trained) == 8
