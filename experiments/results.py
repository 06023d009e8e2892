"""Tables and pictures of what claims.py has found: `python experiments/claims.py --tables` shows them."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TESTS = ("test_id", "test_ood", "test_trap")
VALUE = {"1": 1.0, "0": 0.0, "h": 0.5}
DRAWS = 2000

# The rows of a table: what it is called, its run, and how it decides. These stand in each.
RULES = [("*the truth*", "rules", "truth"), ("*the true sub-scores*", "rules", "sub-scores"),
         ("*the signature alone*", "rules", "signature")]
ROWS = [
    ("discriminative (p = 1)", "p = 1", "no CoT"),
    ("… then with stage 2's pairs and steps", "p = 1, more", "no CoT"),
    ("… on all labelled pairs", "p = 1, unfiltered", "no CoT"),
    ("… on all, ties too, Bradley-Terry with ties", "with ties, unfiltered", "no CoT"),
    ("generative, no CoT, supervised: the likeliest score", "supervised, no CoT", "written"),
    ("… the expectation over scores", "supervised, no CoT", "expectation"),
    ("… after GRPO, pairwise: the likeliest score", "pairwise, no CoT", "written"),
    ("… the expectation over scores", "pairwise, no CoT", "expectation"),
    ("generative, coupled, supervised: the score that it writes", "supervised", "written"),
    ("… the expectation over scores", "supervised", "expectation"),
    ("… reading its CoT", "supervised", "reading"),
    ("… after GRPO, pairwise: the score that it writes", "coupled", "written"),
    ("… the expectation over scores", "coupled", "expectation"),
    ("… reading its CoT", "coupled", "reading"),
    ("DeScore, stage 1 (p = 0.5)", "p = 0.5", "score"), ("… without a CoT", "p = 0.5", "no CoT"),
    ("… reading its CoT", "p = 0.5", "reading"),
    ("… on all labelled pairs", "p = 0.5, unfiltered", "score"),
    ("… without masking (p = 0)", "p = 0", "score"),
    ("DeScore, stage 2", "λ = 0.005", "score"), ("… without a CoT", "λ = 0.005", "no CoT"),
    ("… reading its CoT", "λ = 0.005", "reading"), ("… with λ = 0", "λ = 0", "score"),
    ("… without GRPO", "no GRPO", "score"),
    ("… from stage 1 on all labelled pairs", "λ = 0.005, unfiltered", "score")]
# Who is compared with whom, on the same pairs.
STAGE2 = ("DeScore, stage 2", "λ = 0.005", "score")
STAGE2_ALL = ("DeScore, stage 2, unfiltered", "λ = 0.005, unfiltered", "score")
STAGE1 = ("DeScore, stage 1", "p = 0.5", "score")
STAGE1_ALL = ("DeScore, stage 1, unfiltered", "p = 0.5, unfiltered", "score")
BT_ALL = ("discriminative, unfiltered", "p = 1, unfiltered", "no CoT")
AGAINST = [
    (STAGE2, ("discriminative", "p = 1", "no CoT")),
    (STAGE2, BT_ALL),
    (STAGE2, ("discriminative with stage 2's pairs and steps", "p = 1, more", "no CoT")),
    (STAGE2_ALL, BT_ALL),
    (STAGE1, ("discriminative", "p = 1", "no CoT")),
    (STAGE1_ALL, BT_ALL),
    (STAGE1_ALL, ("discriminative with ties, unfiltered", "with ties, unfiltered", "no CoT")),
    (STAGE2_ALL, ("discriminative with ties, unfiltered", "with ties, unfiltered", "no CoT")),
    (STAGE2, ("coupled, after GRPO, the expectation", "coupled", "expectation")),
    (STAGE2, ("reading its CoT", "λ = 0.005", "reading")),
    (STAGE1, ("reading its CoT", "p = 0.5", "reading")),
    (STAGE2, ("the same without a CoT", "λ = 0.005", "no CoT")),
    (STAGE1, ("the same without a CoT", "p = 0.5", "no CoT")),
    (STAGE2, STAGE1),
    (STAGE2, ("λ = 0", "λ = 0", "score")),
    (("λ = 0", "λ = 0", "score"), STAGE1),
    (("λ = 0.05", "λ = 0.05", "score"), ("λ = 0.005", "λ = 0.005", "score")),
    (STAGE2, ("without GRPO", "no GRPO", "score")),
    (STAGE1, ("without masking", "p = 0", "score")),
    (("DeScore, stage 1, without a CoT", "p = 0.5", "no CoT"), ("without masking", "p = 0", "no CoT")),
    (STAGE1_ALL, ("filtered", "p = 0.5", "score")),
    (BT_ALL, ("filtered", "p = 1", "no CoT")),
    (("coupled, after GRPO, the expectation", "coupled", "expectation"),
     ("supervised", "supervised", "expectation"))]


class Lines:
    """What there is, by kind, run and seed."""

    def __init__(self, lines: list[dict]):
        self.found: dict[tuple[str, str], dict[int, dict]] = {}
        for line in lines:
            self.found.setdefault((line["kind"], line["name"]), {})[line["seed"]] = line

    def of(self, kind: str, name: str) -> dict[int, dict]:
        return self.found.get((kind, name), {})

    def right(self, name: str, way: str, test: str) -> dict[int, np.ndarray]:
        """Whether a run is right on each pair of a test set, by seed."""
        kind = "rules" if name == "rules" else "accuracy"
        lines = {seed: line["sets"][test].get(way) for seed, line in self.of(kind, name).items()}
        return {seed: values(said) for seed, said in lines.items() if said is not None}


def values(said: str) -> np.ndarray:
    return np.array([VALUE[sign] for sign in said])


def interval(samples: dict[int, np.ndarray], figure: Callable = np.mean) -> tuple[float, float, float]:
    """A figure over all samples, and its 95 % interval: seeds drawn with replacement, then what each of them
    has."""
    rng, seeds, drawn = np.random.default_rng(0), list(samples), []
    for _ in range(DRAWS):
        some = [samples[seed] for seed in rng.choice(seeds, len(seeds))]
        drawn.append(figure(np.concatenate([one[rng.integers(len(one), size=len(one))] for one in some])))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(figure(np.concatenate(list(samples.values())))), float(low), float(high)


def cell(samples: dict[int, np.ndarray], signed: bool = False) -> str:
    if not samples:
        return "–"
    mean, low, high = interval(samples)
    form = "+.3f" if signed else ".3f"
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    rows = [row for row in rows if set(row[1:]) != {"–"}]
    if rows:
        print(f"\n### {title}\n\n| | " + " | ".join(columns) + " |\n| --- |" + " ---: |" * len(columns))
        for row in rows:
            print("| " + " | ".join(row) + " |")


def accuracies(title: str, lines: Lines, wanted: list[tuple[str, str, str]], tests=TESTS) -> None:
    """A table of accuracies with their intervals: in its head how many pairs a set has in all seeds, in a row
    its seeds, where they are not all there yet."""
    rows, all_of_them = [], len(lines.of("rules", "rules"))
    for label, run, way in RULES + wanted:
        found = [lines.right(run, way, test) for test in tests]
        some = f" (seeds {', '.join(map(str, sorted(found[0])))})" if len(found[0]) < all_of_them else ""
        if found[0]:
            rows.append([label + some, *map(cell, found)])
    counts = [sum(map(len, lines.right("rules", "truth", test).values())) for test in tests]
    if len(rows) > len(RULES):
        table(title, [f"{test} ({n} pairs)" for test, n in zip(tests, counts)], rows)


def differences(title: str, lines: Lines, against: list[tuple]) -> None:
    """A table of who is right more often than whom, of seeds that both have; the seeds' own in brackets."""
    rows = []
    for (one, *first), (two, *second) in against:
        cells = []
        for test in TESTS:
            a, b = lines.right(*first, test), lines.right(*second, test)
            apart = {seed: a[seed] - b[seed] for seed in sorted(a) if seed in b}
            each = ", ".join(f"{one.mean():+.2f}" for one in apart.values())
            cells.append(f"{cell(apart, signed=True)} ({each})" if apart else "–")
        rows.append([f"{one} − {two}", *cells])
    table(title, list(TESTS), rows)


def paradigms(lines: Lines) -> None:
    accuracies("Accuracy by paradigm", lines, ROWS)
    differences("Differences, on the same pairs", lines, AGAINST)


def by_pairs(lines: Lines, folder: Path) -> None:
    kinds = {"DeScore, stage 1": ("p = 0.5", "score"),
             "discriminative, unfiltered": ("p = 1, unfiltered", "no CoT"),
             "coupled, supervised": ("supervised", "expectation")}
    wanted = []
    for label, (run, way) in kinds.items():
        for n in (100, 200, 400, 800):
            wanted.append((f"{label}, {n} pairs", run if n == 800 else f"{run}, {n} pairs", way))
    if lines.of("accuracy", "p = 0.5, 100 pairs"):
        figure, axes = plt.subplots(1, 3, figsize=(11, 3), sharey=True, constrained_layout=True)
        for axis, test in zip(axes, TESTS):
            for label, (run, way) in kinds.items():
                points = []
                for n in (100, 200, 400, 800):
                    found = lines.right(run if n == 800 else f"{run}, {n} pairs", way, test)
                    if found:
                        points.append((n, *interval(found)))
                n, mean, low, high = zip(*points)
                axis.errorbar(n, mean, [np.subtract(mean, low), np.subtract(high, mean)], marker="o",
                              capsize=2, label=label)
            axis.set(title=test, xscale="log", xlabel="labelled pairs, before the filter")
            axis.set_xticks([100, 200, 400, 800], [100, 200, 400, 800])
            axis.minorticks_off()
        axes[0].set_ylabel("accuracy")
        axes[0].legend(fontsize=7)
        save(figure, folder / "claims-pairs.png")
        accuracies("Accuracy by number of training pairs", lines, wanted)


def drift(lines: Lines, folder: Path) -> None:
    names = ["λ = 0", "λ = 0.0005", "λ = 0.005", "λ = 0.05", "λ = 0.5"]
    wanted = [("before (stage 1)", "p = 0.5", "score"), ("… reading its CoT", "p = 0.5", "reading")]
    for name in names:
        wanted += [(name, name, "score"), ("… reading its CoT", name, "reading")]
    accuracies("Drift: accuracy after stage 2, by λ", lines, wanted)
    curves(lines, {name: (name, "accuracy") for name in names}, folder / "claims-drift.png")


def curves(lines: Lines, wanted: dict[str, tuple[str, str]], path: Path) -> None:
    """Held-out accuracy over steps and over seconds, and the gradient's norm; a thin line a seed."""
    wanted = {label: what for label, what in wanted.items() if lines.of("train", what[0])}
    if not wanted:
        return
    figure, axes = plt.subplots(1, 3, figsize=(12, 3), constrained_layout=True)
    for number, (label, (name, figure_name)) in enumerate(wanted.items()):
        for i, line in enumerate(lines.of("train", name).values()):
            found, style = line["curve"], {"color": f"C{number}", "linewidth": 0.9}
            label_once = label if i == 0 else None
            if figure_name in found:
                step, value, seconds = zip(*found[figure_name])
                axes[0].plot(step, value, "o-", markersize=3, label=label_once, **style)
                axes[1].plot(seconds, value, "o-", markersize=3, **style)
            step, value, _ = zip(*found["grad_norm"])
            axes[2].plot(step, value, **style)
    axes[0].set(title="held-out accuracy", xlabel="optimiser step")
    axes[1].set(title="held-out accuracy", xlabel="seconds of training")
    axes[2].set(title="norm of the gradient", xlabel="optimiser step", yscale="log")
    axes[0].legend(fontsize=7)
    save(figure, path)


def stability(lines: Lines, folder: Path) -> None:
    wanted = {"BT, stage 1": ("p = 0.5", "accuracy"), "DeScore, stage 2": ("λ = 0.005", "accuracy"),
              "coupled GRPO": ("coupled", "written")}
    curves(lines, wanted, folder / "claims-curves.png")
    rows = []
    for label, (name, figure_name) in wanted.items():
        runs = [line["curve"] for _, line in sorted(lines.of("train", name).items())]
        # From step to step, so that a trend does not count; √2 makes it the spread about one.
        norms = [np.log([value for _, value, _ in run["grad_norm"]]) for run in runs]
        spreads = [np.diff(norm).std() / 2**0.5 for norm in norms]
        ends = [run[figure_name][-1][1] for run in runs if figure_name in run]
        if runs:
            rows.append([label, *(", ".join(f"{one:.2f}" for one in some) for some in (spreads, ends))])
    table("Stability, each seed", ["spread of the logarithm of the gradient's norm, step to step",
                                   "held-out accuracy at the end"], rows)


def masking(lines: Lines, folder: Path) -> None:
    ways = ["another video's", *(f"{count} of 5 false" for count in range(1, 6))]
    rows, curve_of = [], {}
    for p in (0, 0.25, 0.5, 0.75, 1):
        name = f"p = {p}"
        found = [lines.right(name, way, "test_id") for way in ("score", "no CoT", "reading")]
        for way in ways:
            found.append({s: values(line["found"][way]) for s, line in lines.of("exchange", name).items()})
        rows.append([name, *map(cell, found)])
        if found[0] and found[-1]:
            curve_of[name] = [interval(one)[0] for one in (found[0], *found[4:])]
    count = sum(map(len, lines.right("rules", "truth", "test_id").values()))
    table(f"With which CoT the score is read (test_id, {count} pairs)",
          ["its own", "none", "its own, read", *ways], rows)
    if curve_of:
        figure, axis = plt.subplots(figsize=(5, 3), constrained_layout=True)
        for name, points in curve_of.items():
            axis.plot(range(0, 101, 20), points, "o-", label=name)
        axis.set(xlabel="sub-scores falsified, %", ylabel="accuracy, test_id")
        axis.legend(fontsize=7)
        save(figure, folder / "claims-masking.png")


def thinking(lines: Lines, folder: Path) -> None:
    rows = []
    figure, axis = plt.subplots(figsize=(5, 3), constrained_layout=True)
    for number, name in enumerate(("p = 0.5", "λ = 0.005", "λ = 0", "no GRPO")):
        cells, points = [], []
        for low, high in ((0, 5), (6, 7), (8, 8), (9, 10)):
            found = {}
            for test in TESTS[:2]:
                for seed, line in lines.of("accuracy", name).items():
                    signs = line["sets"][test]
                    quality = np.array(["0123456789x".index(sign) for sign in signs["R_q"]])
                    chosen = values(signs["score"])[(quality >= low) & (quality <= high)]
                    if len(chosen):
                        found[seed] = np.concatenate([found.get(seed, np.zeros(0)), chosen])
            count = sum(map(len, found.values()))
            cells.append(f"{cell(found)} ({count})" if found else "–")
            points.append(interval(found) if found else (np.nan,) * 3)
        rows.append([name, *cells])
        mean, low, high = zip(*points)
        axis.errorbar(np.arange(4) + 0.08 * number, mean,
                      [np.subtract(mean, low), np.subtract(high, mean)], marker="o", capsize=2, label=name)
    axis.set(xlabel="R_q of the pair's two CoTs", ylabel="accuracy of the score")
    axis.set_xticks(range(4), ["at most 0.5", "0.6, 0.7", "0.8", "0.9, 1"])
    axis.legend(fontsize=7)
    save(figure, folder / "claims-thinking.png")
    table("Accuracy of the score by R_q of a pair's two CoTs (test_id and test_ood)",
          ["at most 0.5", "0.6, 0.7", "0.8", "0.9, 1"], rows)
    rows = []
    for seed, line in sorted(lines.of("train", "λ = 0.005").items()):
        found = line["curve"]
        steps = [f"step {q[0]}: {q[1]:.3f}, {a[1]:.3f}" for q, a in zip(found["quality"], found["accuracy"])]
        rows.append([f"seed {seed}", "; ".join(steps)])
    table("Across the checkpoints of stage 2: R_q, accuracy of the score (half of test_id)", ["each"], rows)


def beyond(lines: Lines) -> None:
    if lines.of("accuracy", "expected mask") or lines.of("accuracy", "all pairs"):
        accuracies("Beyond the paper: accuracy", lines, [
            ("stage 1, the coin", "p = 0.5", "score"), ("its expectation", "expected mask", "score"),
            ("stage 2, matched rollouts", "λ = 0.005", "score"),
            ("all pairs of rollouts", "all pairs", "score")])
        differences("Beyond the paper: differences", lines, [
            (("expectation", "expected mask", "score"), ("coin", "p = 0.5", "score")),
            (("expectation, without a CoT", "expected mask", "no CoT"), ("coin", "p = 0.5", "no CoT")),
            (("all pairs", "all pairs", "score"), ("matched", "λ = 0.005", "score"))])
    rows = []
    for label, one, two in (("expectation / coin", "expected", "coin"),
                            ("all pairs / matched", "all pairs", "matched")):
        both = {s: np.array([line["squares"][one], line["squares"][two]]).T
                for s, line in lines.of("variance", "p = 0.5").items()}
        if both:
            mean, low, high = interval(both, lambda x: x[:, 0].sum() / x[:, 1].sum())
            rows.append([label, f"{mean:.2f} [{low:.2f}, {high:.2f}]"])
    table("Variance of the gradient of L_BT over batches", ["ratio"], rows)


def reward(lines: Lines) -> None:
    """The paper's R beside the strict one, under which the same runs were made before."""
    names = ["λ = 0.005", "λ = 0.005, unfiltered", "all pairs", "λ = 0", "λ = 0.0005", "λ = 0.05", "λ = 0.5"]
    against = []
    for name in names:
        for way, says in (("score", ""), ("reading", ", reading its CoT")):
            against.append(((f"{name}{says}: the paper's R", name, way),
                            ("the strict R", f"strict, {name}", way)))
    differences("The paper's R against the strict one", lines, against)
    rows = []
    for name in names:
        of_seeds = [line["figures"] for _, line in sorted(lines.of("rewards", name).items())]
        for when in ("first", "last"):
            cells = []
            for part in ("reward_format", "reward_quality", "reward_length"):
                found = [figures[f"{when}/{part}"] for figures in of_seeds]
                cells.append("; ".join(f"{mean:.3f} ({std:.3f})" for mean, std in found) or "–")
            rows.append([f"{name}, {when} four steps", *cells])
    table("Parts of R, each seed: the mean (and the standard deviation within a group)",
          ["R_f", "R_q", "R_l"], rows)


def thoughts(lines: Lines, folder: Path) -> None:
    found = lines.of("thoughts", "λ = 0.005")
    if not found:
        return
    rows, points = [], []
    for k in ("1", "2", "4", "8"):
        right = [{s: values(line["found"][test][k]) for s, line in found.items()} for test in TESTS[:2]]
        cost = np.mean([line["seconds"][k] / line["seconds"]["1"] for line in found.values()])
        rows.append([f"K = {k}", *map(cell, right), f"{cost:.2f} ×"])
        points.append((cost, *(interval(one) for one in right)))
    gains = []
    for test in TESTS[:2]:
        gain = {s: values(line["found"][test]["8"]) - values(line["found"][test]["1"])
                for s, line in found.items()}
        gains.append(cell(gain, signed=True))
    rows.append(["K = 8 − K = 1", *gains, ""])
    counts = [sum(len(line["found"][test]["1"]) for line in found.values()) for test in TESTS[:2]]
    table("K thoughts averaged", [*(f"{test} ({n} pairs)" for test, n in zip(TESTS, counts)), "time"], rows)
    figure, axis = plt.subplots(figsize=(5, 3), constrained_layout=True)
    costs, *of_tests = zip(*points)
    for test, found_of in zip(TESTS, of_tests):
        mean, low, high = zip(*found_of)
        axis.errorbar(costs, mean, [np.subtract(mean, low), np.subtract(high, mean)], marker="o", capsize=2,
                      label=test)
    axis.set(xlabel="time, of one thought's (K = 1, 2, 4, 8)", ylabel="accuracy")
    axis.legend(fontsize=7)
    save(figure, folder / "claims-thoughts.png")


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(records: list[dict], folder: Path) -> None:
    """Print every table of which there is something, and draw its picture into a folder."""
    lines = Lines(records)
    paradigms(lines)
    by_pairs(lines, folder)
    stability(lines, folder)
    drift(lines, folder)
    masking(lines, folder)
    thinking(lines, folder)
    beyond(lines)
    reward(lines)
    thoughts(lines, folder)
