"""A small generator of the embedded world, improved by the reward model alone: does it get better, or
prettier?

    python experiments/post_train.py --model runs/demo/rl    # or `make post-train`

The generator is a policy: for a prompt it decides what its clip shows (each attribute, each degree, a
signature), and the renderer draws it. It begins as mediocre as the middling generator of the training pairs,
with any signature. Then the reward model scores its clips, frames in memory, and it is trained on nothing
else: by GRPO on groups of clips for one prompt, or by DPO on the best and the worst of each group. The world
knows the true quality of every clip, so its curve stands beside the reward's: once for scores with a CoT,
once for scores without one, which may go by looks. Best of N is how the generator as it begins fares when
the reward picks.

Prints a table over seeds and draws the curves (matplotlib). What is there already of the same weights and
steps is not repeated.
"""

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
import world

from infer import reward
from model import DeScore
from rl import group_advantages, grpo_loss
from support.command import run_command
from tools.journal import fingerprint

DEGREES = ("fade", "small", "slow", "haze", "flicker")
LEVELS = (0.0, 0.2, 0.4, 0.6, 0.8)
# Each decision that makes a clip, and what it chooses from.
CHOICES = world.VALUES | dict.fromkeys(DEGREES, LEVELS) | {"signature": world.SIGNATURES}
SIZES = [len(values) for values in CHOICES.values()]
PROMPTS, GROUP = 8, 8  # of a step
WAYS = {"with CoT": True, "without CoT": False}


class Generator(nn.Module):
    """π(clip | prompt): what is asked for, one-hot, through a hidden layer, to the logits of each
    decision."""

    def __init__(self, hidden: int = 32):
        super().__init__()
        self.into = nn.Linear(sum(map(len, world.VALUES.values())), hidden)
        self.out = nn.Linear(hidden, sum(SIZES))

    def forward(self, asked: list[world.Scene]) -> list[Tensor]:
        """The log-probabilities of each decision's options for B prompts: a list of (B, options)."""
        wishes = torch.tensor([one_hot(scene) for scene in asked])
        logits = self.out(torch.tanh(self.into(wishes)))
        return [part.log_softmax(-1) for part in logits.split(SIZES, dim=1)]

    def logps(self, asked: list[world.Scene], chosen: Tensor) -> Tensor:
        """log π of each decision: chosen (B, G, decisions) option numbers, and so the result."""
        found = [options.gather(1, chosen[..., i]) for i, options in enumerate(self(asked))]
        return torch.stack(found, -1)

    @torch.no_grad()
    def draw(self, asked: list[world.Scene], n: int, generator: torch.Generator) -> Tensor:
        """n clips for each of B prompts: (B, n, decisions) option numbers."""
        chosen = [torch.multinomial(options.exp(), n, replacement=True, generator=generator)
                  for options in self(asked)]
        return torch.stack(chosen, -1)


def one_hot(asked: world.Scene) -> list[float]:
    wishes = []
    for name, value in asdict(asked).items():
        wishes += [float(value == option) for option in world.VALUES[name]]
    return wishes


def to_clip(chosen: Tensor) -> world.Clip:
    """The clip that some option numbers (decisions,) decide."""
    options = {name: values[number] for (name, values), number in zip(CHOICES.items(), chosen.tolist())}
    scene = world.Scene(**{name: options.pop(name) for name in world.VALUES})
    return world.Clip(scene, **options)


def to_choices(clip: world.Clip) -> list[int]:
    """The option numbers nearest to a clip."""
    shown = asdict(clip.scene) | {"signature": clip.signature}
    numbers = []
    for name, values in CHOICES.items():
        if name in shown:
            numbers.append(values.index(shown[name]))
        else:
            numbers.append(int(np.abs(np.array(values) - getattr(clip, name)).argmin()))
    return numbers


def requests(seed: int, count: int) -> list[world.Scene]:
    rng = np.random.default_rng((7, seed))
    return [world.draw_request(rng, novel=False) for _ in range(count)]


def mediocre(seed: int) -> Generator:
    """The generator as it begins: it imitates clips of the middling skill, with signatures of any kind."""
    torch.manual_seed(seed)
    policy, rng = Generator(), np.random.default_rng((8, seed))
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    skill, asked = world.GENERATORS["train"]["basalt"].skill, requests(seed, 2000)
    clips = [world.draw_clip(scene, skill, str(rng.choice(world.SIGNATURES)), rng) for scene in asked]
    chosen = torch.tensor([to_choices(clip) for clip in clips])[:, None]
    for _ in range(300):
        some = rng.choice(len(asked), 128)
        logps = policy.logps([asked[i] for i in some], chosen[some])
        (-logps.sum(-1).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy


def score(model: DeScore, asked: list[world.Scene], chosen: Tensor, think: bool, seed: int) -> Tensor:
    """The standardised scores of B · G rendered clips, (B, G)."""
    videos, prompts = [], []
    for b, scene in enumerate(asked):
        rng = np.random.default_rng((9, seed, b))
        prompt = world.write_prompt(scene, rng)
        for one in chosen[b]:
            videos.append(torch.from_numpy(world.render(to_clip(one), rng)).permute(0, 3, 1, 2))
            prompts.append(prompt)
    found = reward(model, videos, prompts, fps=world.FPS, think=think, max_new_tokens=160, accept_any=True)
    return torch.tensor([record["standardised"] for record in found]).view(chosen.shape[:2])


def truth(policy: Generator, seed: int) -> dict[str, float]:
    """What the world knows of the clips for 500 other prompts: their mean quality, how steady they are, which
    is a part of it, and how many wear the signature of the best generator in training."""
    asked = requests(10**6 + seed, 500)
    chosen = policy.draw(asked, 1, torch.Generator().manual_seed(seed))
    clips = [to_clip(one[0]) for one in chosen]
    return {"quality": fmean(map(world.quality, asked, clips)),
            "steady": fmean(1 - clip.flicker for clip in clips),
            "vignette": fmean(clip.signature == "vignette" for clip in clips)}


# ------------------------------
# Three ways to use a reward


def train(method: str, model: DeScore, think: bool, seed: int, steps: int) -> Iterator[dict]:
    """Improve the generator by GRPO or DPO; yields a record a step, the first of the generator as it
    begins."""
    policy = mediocre(seed)
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps + 1):
        asked = requests(10**5 * (seed + 1) + step, PROMPTS)
        chosen = policy.draw(asked, GROUP, generator)
        scores = score(model, asked, chosen, think, step)
        yield {"step": step, "reward": scores.mean().item(), **truth(policy, seed)}
        loss = grpo if method == "GRPO" else dpo
        loss(policy, reference, asked, chosen, scores).backward()
        optimizer.step()
        optimizer.zero_grad()


def grpo(policy: Generator, reference: Generator, asked, chosen: Tensor, scores: Tensor) -> Tensor:
    """rl.grpo_loss over the decisions of each clip, as over the tokens of a CoT."""
    logps, mask = policy.logps(asked, chosen), torch.ones_like(chosen, dtype=torch.bool)
    ref_logps = reference.logps(asked, chosen).detach()
    return grpo_loss(logps, logps.detach(), ref_logps, group_advantages(scores), mask, beta=0.01)[0]


def dpo(policy: Generator, reference: Generator, asked, chosen: Tensor, scores: Tensor) -> Tensor:
    """−log σ(β (log π/π_ref of each group's best clip − that of its worst)), β = 0.5 (Rafailov et al.
    2023)."""
    gained = (policy.logps(asked, chosen) - reference.logps(asked, chosen).detach()).sum(-1)  # (B, G)
    best, worst = (gained.gather(1, scores.argsort(1)[:, [place]]) for place in (-1, 0))
    return -F.logsigmoid(0.5 * (best - worst)).mean()


def best_of(model: DeScore, think: bool, seed: int, count: int) -> dict[str, list[float]]:
    """The true quality of the best of N = 1, 2, 4, 8 clips by the reward, and by the truth itself, of the
    generator as it begins."""
    policy, found = mediocre(seed), {}
    asked = requests(10**7 + seed, count)
    chosen = policy.draw(asked, 8, torch.Generator().manual_seed(seed))
    qualities = torch.tensor([[world.quality(scene, to_clip(one)) for one in some]
                              for scene, some in zip(asked, chosen)])
    for name, by in (("reward", score(model, asked, chosen, think, seed)), ("truth", qualities)):
        found[name] = [qualities.gather(1, by[:, :n].argmax(1, keepdim=True)).mean().item()
                       for n in (1, 2, 4, 8)]
    return found


# ------------------------------
# What came out


def mean_and_spread(values: list[float]) -> str:
    return f"{fmean(values):.3f}" + (f" ({stdev(values):.3f})" if len(values) > 1 else "")


def show(lines: list[dict], picture: Path | None) -> None:
    names = ("reward", "quality", "steady", "vignette")
    print("| | " + " | ".join(names) + " |\n| --- |" + " ---: |" * len(names))
    curves = {}
    for line in lines:
        if "curve" in line:
            curves.setdefault((line["method"], line["way"]), []).append(line["curve"])
    begins = next(iter(curves.values()), [])  # the same for all
    rows = [("as it begins", [curve[0] for curve in begins])] if begins else []
    rows += [(f"{method}, {way}", [curve[-1] for curve in some]) for (method, way), some in curves.items()]
    for label, records in rows:
        cells = [mean_and_spread([record[name] for record in records]) for name in names]
        cells[0] = "" if label == "as it begins" else cells[0]
        print(f"| {label} | " + " | ".join(cells) + " |")
    print("\n| best of | 1 | 2 | 4 | 8 |\n| --- |" + " ---: |" * 4)
    for way, by in (*((way, "reward") for way in WAYS), ("with CoT", "truth")):
        found = [line["best"][by] for line in lines if "best" in line and line["way"] == way]
        cells = [mean_and_spread(list(values)) for values in zip(*found)]
        print(f"| {'by the truth' if by == 'truth' else way} | " + " | ".join(cells) + " |")
    if picture:
        draw(curves, picture)


def draw(curves: dict, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"reward": "reward, in standard deviations", "quality": "true quality",
              "vignette": "share with a vignette"}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), constrained_layout=True)
    for number, ((method, way), some) in enumerate(curves.items()):
        for axis, (name, title) in zip(axes, panels.items()):
            values = np.array([[record[name] for record in curve] for curve in some])
            for one in values:
                axis.plot(one, color=f"C{number}", alpha=0.3, linewidth=0.8)
            axis.plot(values.mean(0), color=f"C{number}", label=f"{method}, {way}")
            axis.set(title=title, xlabel="step")
    axes[0].legend(fontsize=7)
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="runs/demo/rl", help="a saved model or a run's folder")
    parser.add_argument("--out", type=Path, default=Path("runs/post_train"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--picture", type=Path, help="a file for the curves (needs matplotlib)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model, path, lines = DeScore.load(args.model), args.out / "lines.jsonl", []
    made = {"weights": fingerprint(model), "steps": args.steps}
    there = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    for seed, way, method in product(range(args.seeds), WAYS, ("best of N", "GRPO", "DPO")):
        run = made | {"method": method, "way": way, "seed": seed}
        line = next((line for line in there if run.items() <= line.items()), None)
        if line is None and method == "best of N":
            line = run | {"best": best_of(model, WAYS[way], seed, count=4 * args.steps)}
        elif line is None:
            line = run | {"curve": list(train(method, model, WAYS[way], seed, args.steps))}
            print(f"{method}, {way}, seed {seed}: {line['curve'][-1]}", file=sys.stderr, flush=True)
        lines.append(line)
        if line not in there:
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
    show(lines, args.picture)


if __name__ == "__main__":
    run_command(main)
