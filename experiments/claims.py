"""The paper's argument on the embedded world: everything that experiments/RESULTS.md shows.

    python experiments/claims.py                      # three seeds side by side: 2.5 hours of two cores
    python experiments/claims.py --only pairs         # fewer training pairs, not in it: an hour more
    python experiments/claims.py --only masking       # another of EXPERIMENTS, with the runs that it needs
    python experiments/claims.py --seeds 1            # one seed
    python experiments/claims.py --quick              # one seed, few pairs: ten minutes
    python experiments/claims.py --tables             # nothing is run: tables and pictures of what there is

What experiments/claims.jsonl has is not run again: to run it all anew, move that file and runs/claims
away. Each run adds a line to it: for each test set and each way to decide a pair, one sign a decided
pair, 1 right, 0 wrong, h where it does not decide. Can be stopped at any moment and goes on from
there, a training run from its checkpoint. (--quick keeps its lines in runs/quick.)

Each seed has training pairs, test sets and a run of its own. Intervals are 95 %, from the bootstrap over
seeds and pairs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy"), str(ROOT / "experiments")]
import paradigms
import world

from coldstart import bt_loss, mask_pairs
from data import Pair, agreement, implied_overall, keys_of, parse_cot, per_video
from infer import Thinking, by_key, judge
from model import DeScore
from support.batches import chunks, draw_seed, read_ahead
from support.command import run_command
from support.files import read_lines
from support.formats import read_pairs

TESTS = ("test_id", "test_ood", "test_trap")
TEMPERATURE, MAX_NEW, THINK = 1.0, 160, 36_000

# ------------------------------
# What is trained: name → (script, the run it starts from, its training file, flags)

STAGE1, STAGE2 = "coldstart.py", "rl.py"
PARADIGM = "experiments/paradigms.py"
COTS, ALL, SCORES, MORE = "train_cots", "train_annotated", "train_scores", "train_more"
WRITE = ["--lr", "1e-3"]  # at stage 1's rate it would hardly learn to
RUNS = {f"p = {p}": (STAGE1, None, COTS, ["--mask-p", str(p)]) for p in (0, 0.25, 0.5, 0.75, 1)}
RUNS |= {
    "p = 0.5, unfiltered": (STAGE1, None, ALL, ["--mask-p", "0.5"]),
    "p = 1, unfiltered": (STAGE1, None, ALL, ["--mask-p", "1"]),
    "with ties, unfiltered": (f"{PARADIGM} ties", None, ALL, []),
    "expected mask": (f"{PARADIGM} expected", None, COTS, []),
    "supervised": (f"{PARADIGM} supervise", None, COTS, WRITE),
    "coupled": (f"{PARADIGM} pairwise", "supervised", SCORES, ["--max-new-tokens", str(MAX_NEW),
                                                               "--keep-rollouts", "1000"]),
    "supervised, no CoT": (f"{PARADIGM} supervise", None, COTS, [*WRITE, "--think", "false"]),
    "pairwise, no CoT": (f"{PARADIGM} pairwise", "supervised, no CoT", SCORES, ["--max-new-tokens", "24"]),
}
RUNS |= {f"λ = {λ}": (STAGE2, "p = 0.5", SCORES, ["--bt-weight", str(λ)])
         for λ in (0.005, 0, 0.0005, 0.05, 0.5)}
WITHOUT_GRPO = ["--w-format", "0", "--w-quality", "0", "--w-length", "0", "--beta", "0"]
RUNS |= {"no GRPO": (STAGE2, "p = 0.5", SCORES, WITHOUT_GRPO),
         "all pairs": (STAGE2, "p = 0.5", SCORES, ["--bt-pairs", "all"])}
RUNS |= {
    "λ = 0.005, unfiltered": (STAGE2, "p = 0.5, unfiltered", SCORES, []),
    # What stage 2 has more, without it: as many pairs of its file, in as many steps, at its rate.
    "p = 1, more": (STAGE1, "p = 1", MORE, ["--mask-p", "1", "--epochs", "1", "--batch-size", "8",
                                            "--lr", "1e-3", "--head-lr", "1e-3", "--warmup", "0"])}
FEWER = (100, 200, 400)  # training pairs, before the filter
for n in FEWER:
    RUNS |= {f"p = 0.5, {n} pairs": (STAGE1, None, f"{COTS}-{n}", ["--mask-p", "0.5"]),
             f"p = 1, unfiltered, {n} pairs": (STAGE1, None, f"{ALL}-{n}", ["--mask-p", "1"]),
             f"supervised, {n} pairs": (f"{PARADIGM} supervise", None, f"{COTS}-{n}", WRITE)}

# What is shown, and the runs that it needs, the most telling first.
EXPERIMENTS = {
    "paradigms": ["p = 0.5", "p = 1", "λ = 0.005", "supervised", "coupled", "p = 0", "supervised, no CoT",
                  "pairwise, no CoT", "p = 1, unfiltered", "with ties, unfiltered", "p = 0.5, unfiltered",
                  "λ = 0", "no GRPO", "p = 1, more", "λ = 0.005, unfiltered"],
    "masking": ["p = 0", "p = 0.25", "p = 0.5", "p = 0.75", "p = 1"],
    "drift": ["λ = 0", "λ = 0.0005", "λ = 0.005", "λ = 0.05", "λ = 0.5"],
    "thoughts": ["λ = 0.005"],
    "beyond": ["p = 0.5", "expected mask", "λ = 0.005", "all pairs"],
    # All that depends on R. A name with "strict, " before it is a line from before R was the paper's.
    "reward": ["λ = 0.005", "λ = 0.005, unfiltered", "all pairs", "λ = 0", "λ = 0.05", "λ = 0.0005",
               "λ = 0.5"],
    "pairs": [name for name in RUNS if name.endswith("00 pairs")]}
NO_COT = ("supervised, no CoT", "pairwise, no CoT")
# Discriminative ones of which nothing is asked with a CoT.
UNTHINKING = ("p = 1, unfiltered", "with ties, unfiltered", "p = 1, more",
              *(f"p = 1, unfiltered, {n} pairs" for n in FEWER))
# Those evaluated on the way, which takes as long as training them.
CURVED = ("p = 0.5", "coupled", *EXPERIMENTS["drift"])
GENERATIVE = ("supervised", "coupled", *(f"supervised, {n} pairs" for n in FEWER))


class Bench:
    """One seed of the whole: its data, its runs, and the lines that say what came out."""

    def __init__(self, seed: int, quick: bool):
        self.seed, self.quick = seed, quick
        self.folder = ROOT / ("runs/quick" if quick else "runs/claims") / str(seed)
        self.lines = self.folder.parent / "claims.jsonl" if quick else ROOT / "experiments/claims.jsonl"
        self.pairs, self.tests, self.steps = (200, 60, 30) if quick else (800, 300, 75)

    def data(self, name: str) -> Path:
        return self.folder / "data" / f"{name}.jsonl"

    def prepare(self) -> None:
        if not self.data(SCORES).is_file():
            call("toy/prepare.py", self.data("").parent, "--pairs", self.pairs, "--test-pairs", self.tests,
                 "--seed", 100 + self.seed)
        if not self.known("rules", "rules"):
            sets = {}
            for test in TESTS:
                rows = [row for row in read_lines(self.data(test)) if row["preference"] != "tie"]
                margins = [world.rules(row) for row in rows]
                sets[test] = {rule: "".join(sign(margin[rule], row["preference"] == "A")
                                            for margin, row in zip(margins, rows)) for rule in margins[0]}
            self.add("rules", "rules", sets=sets)
        rows = self.data("test_id").read_text().splitlines(True)
        self.data("curve").write_text("".join(rows[: self.tests // 2]))
        for preset in ("coldstart.json", "rl.json"):  # the toy's, without its test sets
            settings = json.loads((ROOT / "toy" / preset).read_text())
            del settings["test"]
            (self.folder / preset).write_text(json.dumps(settings))
        names = {json.loads(row)["video_a"] for row in self.data("train").read_text().splitlines()}
        for n in FEWER:  # the filtered of the first n
            first = {name for name in names if int(name.split("_")[1]) < n}
            for file in (COTS, ALL):
                kept = [row for row in self.data(file).read_text().splitlines(True)
                        if any(name in row for name in first)]
                self.data(f"{file}-{n}").write_text("".join(kept))
        annotated = {row["video_a"]: row for row in read_lines(self.data(ALL))}  # with CoTs
        more = [annotated[row["video_a"]] for row in read_lines(self.data(SCORES))
                if row["preference"] != "tie"]
        self.data(MORE).write_text("".join(json.dumps(row) + "\n" for row in more[: 16 * 8]))

    def known(self, kind: str, name: str) -> dict | None:
        """The line of an experiment, if it is there."""
        for line in read_lines(self.lines):
            if (line["kind"], line["name"], line["seed"]) == (kind, name, self.seed):
                return line
        return None

    def add(self, kind: str, name: str, **found) -> None:
        with self.lines.open("a") as file:
            file.write(json.dumps({"kind": kind, "name": name, "seed": self.seed, **found}) + "\n")

    def train(self, name: str) -> Path:
        """The model of a run, trained if it is not there."""
        script, parent, train, flags = RUNS[name]
        model = "toy/backbone" if parent is None else self.train(parent)
        out = self.folder / re.sub(r"[^\w.]+", "_", name)
        info, curved = out / "model/descore.json", name in CURVED
        if info.is_file() and (not curved or "score_std" in json.loads(info.read_text())):
            self.add_curve(name, out)  # it may have been stopped before
            return out
        path = self.data(train)
        common = ["--train", path, "--model", model, "--out", out, "--seed", self.seed,
                  "--eval-before", "false"]
        if script == STAGE2 or "pairwise" in script:
            preset, every = "rl.json", 4
            common += ["--steps", 8 if self.quick else 16]
        else:
            preset, every = "coldstart.json", 25
            rows = [row for row in read_lines(path) if row["preference"] != "tie" or "ties" in script]
            common += ["--epochs", max(1, round(self.steps * 16 / len(rows)))]  # as many steps for each
        if curved:
            common += ["--test", self.data("curve"), "--eval-every", every]
        call(*script.split(), "--preset", self.folder / preset, *common, *flags)
        self.add_curve(name, out)
        return out

    def add_curve(self, name: str, out: Path) -> None:
        if not self.known("train", name):
            found = curve(out)
            if name == "coupled":
                found["written"] = self.written(out, found["accuracy_reading"])
            self.add("train", name, curve=found)

    def written(self, out: Path, evaluations: list) -> list:
        """[step, value, seconds] of a coupled run: how often its written score is right, by evaluation."""
        pairs = read_pairs(self.data("curve"), dimensions=world.DIMENSIONS)
        pairs = [pair for pair in pairs if pair.human]
        thoughts, points = read_lines(out / "held_out.jsonl"), []
        for step, _, seconds in evaluations:
            cots = {(one["video"], one["prompt"]): one["cot"] for one in thoughts if one["step"] == step}
            said = signs(pairs, no_nan([paradigms.written_score(cots[key]) for key in keys_of(pairs)]))
            right = (said.count("1") + said.count("h") / 2) / len(said)
            points.append([step, round(right, 5), seconds])
        return points

    # -- what is measured of a run

    def evaluate(self, name: str) -> None:
        """How often a run is right on each test set; of the runs by p also with CoTs that are not its own."""
        if self.known("accuracy", name):
            return
        model = DeScore.load(self.train(name))
        sets = {}
        for test in TESTS:
            pairs = [pair for pair in read_pairs(self.data(test), dimensions=world.DIMENSIONS) if pair.human]
            if name in NO_COT:
                sets[test] = expectations(model, pairs)
                continue
            if name in UNTHINKING:
                sets[test] = {"no CoT": signs(pairs, score_all(model, pairs, [None] * 2 * len(pairs)))}
                continue
            thinking = Thinking(MAX_NEW, TEMPERATURE, seed=self.seed, think_tokens=THINK)
            judged = by_key(judge(model, keys_of(pairs), thinking, without_cot=True))
            cots = [judged[key]["cot"] for key in keys_of(pairs)]
            sets[test] = outcomes(pairs, judged, name in GENERATIVE)
            if name in GENERATIVE:
                sets[test]["expectation"] = expectations(model, pairs, cots)["expectation"]
            if name in EXPERIMENTS["masking"] and test == "test_id":
                self.exchange(name, model, pairs, cots)
        self.add("accuracy", name, sets=sets)

    def exchange(self, name: str, model: DeScore, pairs: list[Pair], cots: list[str]) -> None:
        """How often a run is right with other CoTs than it wrote: another video's, or its own with 1 to 5 of
        the five sub-scores falsified."""
        rng = np.random.default_rng(self.seed)
        turned = len(cots) // 2 // 2 * 2  # another pair's, side by side
        ways = {"another video's": cots[turned:] + cots[:turned]}
        for count in range(1, 6):
            ways[f"{count} of 5 false"] = [falsified(cot, count, rng) for cot in cots]
        found = {way: signs(pairs, score_all(model, pairs, some)) for way, some in ways.items()}
        self.add("exchange", name, found=found)

    def many_thoughts(self, name: str, most: int = 8) -> None:
        """How often the mean score of K thoughts is right, K = 1, 2, 4, 8, and the seconds they take."""
        if self.known("thoughts", name):
            return
        model = DeScore.load(self.train(name))
        found, seconds = {}, {}
        for test in TESTS[:2]:
            pairs = read_pairs(self.data(test), dimensions=world.DIMENSIONS)[: self.tests // 2]
            pairs = [pair for pair in pairs if pair.human]
            scores = []
            for part in chunks(keys_of(pairs), 32):
                batch, _ = next(read_ahead(model.processor, [[[key] for key in part]]))
                seeds = [draw_seed(self.seed, len(scores), row) for row in range(len(part))]
                scores.append(model.think(batch, most, MAX_NEW, TEMPERATURE, seeds=seeds).scores)
            scores = torch.cat(scores)  # (videos, most)
            found[test] = {k: signs(pairs, scores[:, :k].mean(1)) for k in (1, 2, 4, 8)}
        batch = model.encode(batch)
        for k in (1, 2, 4, 8):
            started = time.time()
            model.think(batch, k, MAX_NEW, TEMPERATURE)
            seconds[k] = round((time.time() - started) / len(batch), 4)
        self.add("thoughts", name, found=found, seconds=seconds)

    def rewards(self, name: str) -> None:
        """Of each part of R of the rollouts that a run kept, in its first and its last four steps: the
        mean, and the mean of the standard deviations within the groups."""
        if self.known("rewards", name):
            return
        groups: dict[str, list] = {"first": [], "last": []}
        for video in read_lines(self.train(name) / "rollouts.jsonl"):
            if video["step"] <= 4 or video["step"] > 12:
                groups["first" if video["step"] <= 4 else "last"].append(video["rollouts"])
        figures = {}
        for when, of_videos in groups.items():
            for part in ("reward", "reward_format", "reward_quality", "reward_length"):
                values = np.array([[rollout[part] for rollout in rollouts] for rollouts in of_videos])
                figures[f"{when}/{part}"] = [round(values.mean(), 4), round(values.std(1, ddof=1).mean(), 4)]
        self.add("rewards", name, groups=len(groups["last"]), figures=figures)

    def variances(self, name: str, batches: int = 24, size: int = 8) -> None:
        """The variance of an L_BT gradient over batches of pairs: by a coin and by its expectation, over
        matched rollouts and over all of them, as Σ |g − mean g|² / (batches − 1)."""
        if self.known("variance", name):
            return
        model = DeScore.load(self.train(name))
        model.set_trainable(16)
        torch.manual_seed(self.seed)
        pairs = read_pairs(self.data(COTS), dimensions=world.DIMENSIONS)
        pairs = [pair.winner_first() for pair in pairs if pair.human]
        gradients: dict[str, list[torch.Tensor]] = {}
        for number in range(6 if self.quick else batches):
            rng = np.random.default_rng((self.seed, number))
            some = [pairs[i] for i in rng.choice(len(pairs), size, replace=False)]
            for way, loss in bt_losses(model, some, draw_seed(self.seed, number)).items():
                parts = torch.autograd.grad(loss, list(model.trainable().values()), retain_graph=True)
                gradients.setdefault(way, []).append(torch.cat([part.flatten() for part in parts]))
        found = {}
        for way, all_of_them in gradients.items():
            stacked = torch.stack(all_of_them)
            squares = (stacked - stacked.mean(0)).square().sum(1)
            found[way] = [float(f"{value:.6g}") for value in squares]
        self.add("variance", name, squares=found)


def call(*command) -> None:
    print("$ python " + " ".join(map(str, command)), flush=True)
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def curve(out: Path) -> dict[str, list]:
    """What a run's log says over its steps: [step, value] of the gradient's norm, held-out accuracies, R_q,
    and the seconds of training so far."""
    found: dict[str, list] = {}
    seconds = 0.0
    for record in read_lines(out / "metrics.jsonl"):
        seconds += record.get("seconds", 0.0)
        for name in ("grad_norm", "curve/accuracy", "curve/accuracy_no_cot", "curve/accuracy_reading",
                     "curve/quality", "reward"):
            if record.get(name) is not None:
                point = [record["step"], round(record[name], 5), round(seconds, 1)]
                found.setdefault(name.removeprefix("curve/"), []).append(point)
    return found


# ------------------------------
# Who is right


def sign(margin: float, prefers_a: bool) -> str:
    """1 where the margin A − B has the sign of the preference, 0 where not, h where it is 0."""
    return "h" if margin == 0 else str(int((margin > 0) == prefers_a))


def signs(pairs: list[Pair], scores) -> str:
    """One sign a pair, from the scores of A, B, A, B, …"""
    margins = [a - b for a, b in torch.as_tensor(scores).view(-1, 2).tolist()]
    return "".join(sign(margin, pair.human > 0) for margin, pair in zip(margins, pairs))


def outcomes(pairs: list[Pair], judged: dict, generative: bool) -> dict[str, str]:
    """Signs by reading the CoT, and by the score with it and without it, or by the written score of a model
    that writes one. Also R_q, in tenths of a pair's two."""
    records = [judged[key] for key in keys_of(pairs)]
    cots = [record["cot"] for record in records]
    qualities = []
    for cot, gold in zip(cots, per_video(pairs, "scores")):
        read = parse_cot(cot, world.DIMENSIONS)
        qualities.append(agreement(read["dimensional_scores"], gold) if read else 0.0)
    both_of = [round(5 * (a + b)) for a, b in zip(qualities[::2], qualities[1::2])]
    read = [implied_overall(cot, world.DIMENSIONS) or float("nan") for cot in cots]
    found = {"R_q": "".join("0123456789x"[tenths] for tenths in both_of),
             "reading": signs(pairs, no_nan(read))}
    if generative:
        return found | {"written": signs(pairs, no_nan([paradigms.written_score(cot) for cot in cots]))}
    return found | {"score": signs(pairs, [record["score"] for record in records]),
                    "no CoT": signs(pairs, [record["score_no_cot"] for record in records])}


def no_nan(values: list[float]) -> torch.Tensor:
    """What is said of both videos of a pair, 0 of both where one cannot be read: it does not decide."""
    values = torch.tensor(values).view(-1, 2)
    return torch.where(values.isnan().any(1, keepdim=True), 0.0, values)


def expectations(model: DeScore, pairs: list[Pair], cots: list[str] | None = None) -> dict[str, str]:
    """Signs by the likeliest score that a model writes, behind CoTs or without, and by the expectation over
    all."""
    likeliest, expected = [], []
    keys = keys_of(pairs)
    for some, written in zip(chunks(keys, 32), chunks(cots or [None] * len(keys), 32)):
        batch, _ = next(read_ahead(model.processor, [[[key] for key in some]]))
        found = paradigms.expected_scores(model, batch, written if cots else None)
        for values, all_of_them in zip(found, (likeliest, expected)):
            all_of_them += values.tolist()
    return {"written": signs(pairs, likeliest), "expectation": signs(pairs, expected)}


@torch.no_grad()
def score_all(model: DeScore, pairs: list[Pair], cots: list[str]) -> torch.Tensor:
    scores = []
    for keys, some in zip(chunks(keys_of(pairs), 64), chunks(cots, 64)):
        batch, _ = next(read_ahead(model.processor, [[[key] for key in keys]]))
        scores.append(model.score(batch, some))
    return torch.cat(scores)


def falsified(cot: str, count: int, rng: np.random.Generator) -> str:
    """A CoT with so many of its five sub-scores replaced by others, in the lines that give them and in the
    answer; one that cannot be read stays as it is."""
    read = parse_cot(cot, world.DIMENSIONS)
    if read is None:
        return cot
    scores = dict(read["dimensional_scores"])
    for name in rng.choice(list(scores), count, replace=False):
        others = [value for value in (0, 1, 2, "N/A") if value != scores[name]]
        scores[name] = others[rng.integers(len(others))]
        cot = re.sub(rf"(?m)^({name}: .*, so ).*$", rf"\g<1>{scores[name]}", cot)
    answer = json.dumps({"dimensional_scores": scores}, separators=(",", ":"))
    return cot[: cot.index("<answer>")] + f"<answer>\n{answer}\n</answer>"


def bt_losses(model: DeScore, pairs: list[Pair], seed: int) -> dict[str, torch.Tensor]:
    """L_BT of some pairs, four ways."""
    batch, _ = next(read_ahead(model.processor, [[pair.videos() for pair in pairs]]))
    batch = model.encode(batch)
    with_cot, without = (model.score(batch, cots).view(-1, 2).T
                         for cots in (per_video(pairs, "cot"), [None] * 2 * len(pairs)))
    masked = torch.tensor(mask_pairs(len(pairs), 0.5, seed, 0))
    coin = torch.where(masked, without, with_cot)
    thoughts = model.think(batch, 8, MAX_NEW, TEMPERATURE)
    _, scores = model.group(batch, thoughts.tokens, thoughts.mask)
    r_w, r_l = scores.view(-1, 2, 8).unbind(1)
    return {"coin": bt_loss(*coin), "expected": (bt_loss(*with_cot) + bt_loss(*without)) / 2,
            "matched": bt_loss(r_w, r_l), "all pairs": bt_loss(r_w[:, :, None], r_l[:, None, :])}


def measure(bench: Bench, experiments: list[str]) -> None:
    """All that is asked of a seed and not yet known."""
    bench.prepare()
    for experiment in experiments:
        names = EXPERIMENTS[experiment]
        for name in names[:5] if bench.quick else names:
            bench.evaluate(name)
        if experiment in ("thoughts", "reward"):
            bench.many_thoughts("λ = 0.005")
        if experiment == "reward":
            for name in names:
                bench.rewards(name)
        if experiment == "beyond":
            bench.variances("p = 0.5")


def side_by_side(seeds: list[int], only: str | None) -> None:
    """A process with one thread for each seed: together they do more than one after the other with all the
    cores. What they print goes to runs/claims/SEED.log."""
    command = [sys.executable, __file__, *(["--only", only] if only else []), "--seeds"]
    processes, folder = [], ROOT / "runs/claims"
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        with (folder / f"{seed}.log").open("a") as log:
            processes.append(subprocess.Popen([*command, str(seed)], stdout=log, stderr=log,
                                              env=os.environ | {"OMP_NUM_THREADS": "1"}))
        print(f"seed {seed}: {log.name}", flush=True)
    failed = [seed for seed, process in zip(seeds, processes) if process.wait()]
    if failed:
        raise SystemExit(f"error: seeds {failed} failed: see their logs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=EXPERIMENTS, help="one experiment [all but pairs]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="one seed, few pairs, the main paradigms")
    parser.add_argument("--tables", action="store_true", help="print and draw what there is")
    args = parser.parse_args()
    experiments = [args.only] if args.only else [name for name in EXPERIMENTS if name != "pairs"]
    if args.quick and not args.tables:
        measure(Bench(args.seeds[0], quick=True), experiments[:1])
    elif len(args.seeds) == 1 and not args.tables:
        measure(Bench(args.seeds[0], quick=False), experiments)
    elif not args.tables:
        side_by_side(args.seeds, args.only)
    lines = read_lines(Bench(0, args.quick).lines)
    import results  # draws with matplotlib, which a run does not need

    results.show(lines, ROOT / ("runs/quick" if args.quick else "experiments"))


if __name__ == "__main__":
    run_command(main)
