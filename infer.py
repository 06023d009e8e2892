"""Think about videos, score them, rank them, and measure how well the scores agree with people.

    python infer.py video.mp4 "a red circle moves left"             # the CoT, its sub-scores, the reward
    python infer.py a.mp4 b.mp4 c.mp4 "a red circle moves left"     # best first
    python infer.py --pairs test.jsonl --out predictions.jsonl      # accuracy against human labels
"""

import argparse
import json
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from data import (
    DIMENSIONS,
    MAX_TOKENS,
    DataError,
    Pair,
    Processor,
    agreement,
    follows_format,
    parse_cot,
    read_pairs,
)
from model import DeScore
from run import Ranks

# ------------------------------------------------------------------------------------------------------------
# How well scores agree with people


def accuracy_without_ties(human: torch.Tensor, margin: torch.Tensor) -> float:
    """Share of the pairs with a preference whose sign the margin has; a margin of 0 is wrong.

    human (N,): +1 (A preferred), −1 (B), 0 (tie); margin (N,): r_A − r_B. NaN where every pair is a tie."""
    human, margin = torch.as_tensor(human), torch.as_tensor(margin)
    right = torch.sign(margin) == human
    return right[human != 0].double().mean().item()


def accuracy_with_ties(human: torch.Tensor, margin: torch.Tensor) -> float:
    """The best accuracy over thresholds ε, |margin| ≤ ε counting as "tie" (arXiv 2305.14324).

    human (N,) and margin (N,) as above; ε < 0, no tie at all, is among the thresholds. O(n log n)."""
    human, margin = torch.as_tensor(human), torch.as_tensor(margin)
    size, index = margin.abs().sort()
    human, margin = human[index], margin[index]
    as_tie = (human == 0).long()
    as_sign = ((torch.sign(margin) == human) & (human != 0)).long()
    # How many are right with the k smallest margins called ties and the rest by sign; k must not split equal
    # margins.
    right = as_sign.sum() + torch.cat([as_tie.new_zeros(1), (as_tie - as_sign).cumsum(0)])
    whole = torch.ones(len(human) + 1, dtype=torch.bool)
    whole[1:-1] = size[1:] != size[:-1]
    return right[whole].max().item() / len(human) if len(human) else float("nan")


def measure(pairs: list[Pair], judged: dict[tuple[str, str], dict]) -> dict[str, float]:
    """Figures over pairs from the judgement of each (video, prompt) key; a figure stands only where it has a
    base: accuracies where there are labels, quality (the mean R_q) where there are reference sub-scores."""
    figures = {}
    human = torch.tensor([pair.human for pair in pairs])
    for field, suffix in (("reward", ""), ("reward_no_cot", "_no_cot")):
        if all(field in record for record in judged.values()):
            rewards = [[judged[key][field] for key in pair.videos()] for pair in pairs]
            a, b = torch.tensor(rewards, dtype=torch.double).T
            figures["accuracy" + suffix] = accuracy_without_ties(human, a - b)
            figures["accuracy_ties" + suffix] = accuracy_with_ties(human, a - b)
    if all("cot" in record for record in judged.values()):
        reference = {key: scores for pair in pairs
                     for key, scores in zip(pair.videos(), (pair.scores_a, pair.scores_b)) if scores}
        cots = {key: parse_cot(record["cot"]) for key, record in judged.items()}
        if reference:
            figures["quality"] = statistics.fmean(
                agreement(cots[key]["dimensional_scores"], scores) if cots[key] else 0.0
                for key, scores in reference.items())
        figures["format_rate"] = statistics.fmean(follows_format(record["cot"]) for record in judged.values())
        figures["truncated"] = statistics.fmean(record["truncated"] for record in judged.values())
        rewards = [record["reward"] for record in judged.values()]
        figures |= {"score_mean": statistics.fmean(rewards), "score_std": statistics.pstdev(rewards)}
    return figures


def read_tests(paths: list[str], label: str | None, root: str | None) -> dict[str, list[Pair]]:
    """Test sets by the names of their files, under which their figures will stand."""
    tests = {Path(path).stem: read_pairs(path, label, root) for path in paths}
    if len(tests) < len(paths):
        raise DataError(f"--test {' '.join(paths)}: two files have the same name, and figures go by it")
    return tests


def evaluate(model: DeScore, tests: dict[str, list[Pair]], ranks: Ranks, max_new_tokens: int,
             temperature: float, max_tokens: int, workers: int = 0) -> dict[str, float]:
    """Measure a model on test sets by name: figures by "name/figure". Every video of a set is judged once,
    with a CoT and without one, the work split over ranks."""
    figures = {}
    for name, pairs in tests.items():
        keys = list(dict.fromkeys(key for pair in pairs for key in pair.videos()))
        mine, numbers = ranks.share(keys), ranks.share(list(range(len(keys))))
        with model.gathered():
            judged = model.judge(mine, max_new_tokens, temperature, max_tokens=max_tokens, without_cot=True,
                                 workers=workers, numbers=numbers)
            judged = tqdm(judged, f"evaluate {name}", total=len(mine), disable=not ranks.first, leave=False)
            judged = ranks.gather_all(list(judged))
        figures |= {f"{name}/{key}": value for key, value in measure(pairs, by_key(judged)).items()}
    return figures


def by_key(judged: list[dict]) -> dict[tuple[str, str], dict]:
    return {(record["video"], record["prompt"]): record for record in judged}


# ------------------------------------------------------------------------------------------------------------
# What is shown


def standardised(model: DeScore, reward: float) -> float | None:
    """A Bradley-Terry score has no scale of its own: in standard deviations from the mean of the held-out
    videos on which the model was last measured."""
    if not model.info.get("score_std"):
        return None
    return (reward - model.info["score_mean"]) / model.info["score_std"]


def describe(model: DeScore, record: dict) -> dict:
    """What is known of one judged video, as infer.py --json prints it."""
    if "cot" not in record:
        reward = record["reward_no_cot"]
        return {"video": record["video"], "prompt": record["prompt"], "reward": reward, "cot": None}
    cot = parse_cot(record["cot"])
    return record | {"standardised": standardised(model, record["reward"]),
                     "format_ok": follows_format(record["cot"]),
                     "scores": cot and cot["dimensional_scores"],
                     "overall_score": cot and cot["overall_score"]}


def show_reward(found: dict) -> str:
    text = f"{found['reward']:+.4f}"
    if "reward_std" in found:
        text += f" ± {found['reward_std']:.4f}"
    z = found.get("standardised")
    return text + (f"   ({z:+.2f} standard deviations from the mean)" if z is not None else "")


def show(found: dict) -> str:
    """The same for a reader: the CoT, a table of sub-scores, the reward."""
    lines = []
    if found["cot"] is not None:
        lines = [found["cot"].strip(), ""]
        if found["truncated"]:
            lines.append("(the CoT ran into the token limit and was scored as it stands)")
        if found["scores"]:
            lines += [f"{name:<12} {found['scores'][name]}" for name in DIMENSIONS]
        else:
            lines.append("(no sub-scores can be read from this CoT)")
    return "\n".join([*lines, f"{'reward':<12} {show_reward(found)}"])


def default_model() -> str:
    """What the stages left behind: the model of stage 2, or else that of stage 1."""
    for run in ("runs/rl", "runs/coldstart"):
        if Path(run, "model").is_dir():
            return run
    raise DataError("no model in runs/: run `torchrun coldstart.py` and `torchrun rl.py` first, or pass "
                    "--model")


def confidence(human: torch.Tensor, margin: torch.Tensor, accuracy, draws: int = 1000) -> tuple[float, float]:
    """The bootstrap's 95 % interval of an accuracy, from pairs drawn with replacement."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(draws):
        index = torch.randint(len(human), (len(human),), generator=generator)
        found.append(accuracy(human[index], margin[index]))
    ends = torch.tensor([0.025, 0.975], dtype=torch.double)
    return tuple(torch.tensor(found, dtype=torch.double).nanquantile(ends).tolist())


def report(pairs: list[Pair], judged: dict[tuple[str, str], dict]) -> dict:
    """`measure`, with an interval for each accuracy and a row for each pair of generators in the file."""
    figures = {"pairs": len(pairs), **measure(pairs, judged), "intervals": {}, "generators": {}}
    human = torch.tensor([pair.human for pair in pairs])
    by_models: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        if pair.model_a and pair.model_b:
            by_models.setdefault(" / ".join(sorted((pair.model_a, pair.model_b))), []).append(i)
    for field, suffix in (("reward", ""), ("reward_no_cot", "_no_cot")):
        if "accuracy" + suffix not in figures:
            continue
        margin = [judged[a][field] - judged[b][field] for a, b in map(Pair.videos, pairs)]
        margin = torch.tensor(margin, dtype=torch.double)
        for name, accuracy in (("accuracy", accuracy_without_ties), ("accuracy_ties", accuracy_with_ties)):
            figures["intervals"][name + suffix] = confidence(human, margin, accuracy)
            for models, rows in sorted(by_models.items()):
                row = figures["generators"].setdefault(models, {"pairs": len(rows)})
                row[name + suffix] = accuracy(human[rows], margin[rows])
    return figures


def show_report(figures: dict) -> str:
    lines = [f"{'pairs':<24} {figures['pairs']}"]
    for name, value in figures.items():
        if isinstance(value, float):
            low, high = figures["intervals"].get(name, (None, None))
            interval = f"   [{low:.4f}, {high:.4f}]" if low is not None else ""
            lines.append(f"{name:<24} {value:.4f}{interval}")
    for models, row in figures["generators"].items():
        lines.append(f"{models}: " + ", ".join(f"{value} pairs" if name == "pairs" else f"{name} {value:.4f}"
                                              for name, value in row.items()))
    return "\n".join(lines)


def judge_pairs(model: DeScore, pairs: list[Pair], args: argparse.Namespace) -> dict[tuple[str, str], dict]:
    """Judge each (video, prompt) of the pairs once. With --out, judgements are appended line by line; a run
    that was cut off goes on behind them."""
    keys = list(dict.fromkeys(key for pair in pairs for key in pair.videos()))
    done: list[dict] = []
    if args.out and args.out.is_file():
        lines = args.out.read_text(encoding="utf-8").splitlines(keepends=True)
        done = [json.loads(line) for line in lines if line.endswith("\n")]
        if not by_key(done).keys() <= set(keys):
            raise DataError(f"{args.out}: holds judgements of other videos; remove it or choose another "
                            "--out")
        print(f"{args.out}: {len(done)} of {len(keys)} videos are judged already", file=sys.stderr)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("".join(json.dumps(record) + "\n" for record in done), encoding="utf-8")
    with args.out.open("a", encoding="utf-8") if args.out else nullcontext() as file:
        judged = model.judge(keys, args.max_new_tokens, args.temperature, args.seed, args.max_tokens,
                             by_key(done), args.samples, think=args.cot == "on", without_cot=True,
                             workers=args.workers)
        for record in tqdm(judged, "judge", total=len(keys), initial=len(done), unit="video"):
            done.append(record)
            if file:
                file.write(json.dumps(record) + "\n")
                file.flush()
    return by_key(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", metavar="VIDEO … PROMPT",
                        help="one video or several, then their prompt")
    parser.add_argument("--model", help="a saved model or a run's folder [runs/rl, else runs/coldstart]")
    parser.add_argument("--pairs", help="a pair file of any known format to evaluate on instead")
    parser.add_argument("--label", help="with --pairs: the column of the preference, where there are several")
    parser.add_argument("--root", help="with --pairs: the folder that its paths are relative to [its own]")
    parser.add_argument("--out", type=Path,
                        help="with --pairs: a file for the judgements, one JSON object a video")
    parser.add_argument("--cot", choices=("on", "off"), default="on", help="off: score without thinking")
    parser.add_argument("--samples", type=int, default=1,
                        help="CoTs a video, their rewards averaged (needs a temperature)")
    parser.add_argument("--instruction",
                        help="a file with <video> and <prompt> in it [the model's own]; with --pairs, "
                             "problem: the file's own column of that name")
    parser.add_argument("--scoring-layout", choices=("ours", "release"),
                        help="release: score in a second user turn, as the authors' do [the model's own]")
    parser.add_argument("--max-new-tokens", type=int, default=4096, help="longest CoT")
    parser.add_argument("--temperature", type=float, default=None,
                        help="0 takes the likeliest token [0; with --samples 1]")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling at a temperature above 0")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS,
                        help="tokens at a time, of prompts and CoTs")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode videos ahead")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args()
    if bool(args.pairs) == bool(args.inputs) or len(args.inputs) == 1:
        parser.error("give videos and their prompt, or --pairs FILE")
    if args.temperature is None:
        args.temperature = 0.0 if args.samples == 1 else 1.0
    model = DeScore.load(args.model or default_model())
    if args.scoring_layout:
        model.info["scoring_layout"] = args.scoring_layout
    if args.instruction:
        if args.instruction != "problem" and not Path(args.instruction).is_file():
            raise DataError(f"{args.instruction}: no such file")
        text = None if args.instruction == "problem" else Path(args.instruction).read_text(encoding="utf-8")
        model.processor = Processor(model.processor.tokenizer, model.processor.settings, text)
    if args.pairs:
        pairs = read_pairs(args.pairs, args.label, args.root)
        for pair in pairs if args.instruction == "problem" else ():
            if not pair.problem:
                raise DataError(f"{args.pairs}: has no problem column to serve as the instruction")
            pair.prompt = pair.problem
        print(pairs.summary(), file=sys.stderr)
        figures = report(pairs, judge_pairs(model, pairs, args))
        print(json.dumps(figures) if args.json else show_report(figures))
        return
    keys = [(video, args.inputs[-1]) for video in args.inputs[:-1]]
    judged = model.judge(keys, args.max_new_tokens, args.temperature, args.seed, args.max_tokens,
                         samples=args.samples, think=args.cot == "on", workers=args.workers)
    judged = tqdm(judged, total=len(keys), unit="video", disable=len(keys) < 2)
    found = [describe(model, record) for record in judged]
    found.sort(key=lambda record: -record["reward"])
    if args.json:
        print(json.dumps(found if len(found) > 1 else found[0], ensure_ascii=False))
    elif len(found) > 1:
        for place, record in enumerate(found, 1):
            print(f"{place}. {show_reward(record)}  {record['video']}")
    else:
        print(show(found[0]))


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        raise SystemExit(f"error: {error}") from error
