"""Think about videos, score them, rank them, and measure how well the scores agree with people.

    python infer.py video.mp4 "a red circle moves left"             # the CoT, its sub-scores, the reward
    python infer.py a.mp4 b.mp4 c.mp4 "a red circle moves left"     # best first
    python infer.py --pairs test.jsonl --out predictions.jsonl      # accuracy against human labels
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from data import DIMENSIONS, DataError, Pair, agreement, follows_format, parse_cot, read_pairs
from model import DeScore, Ranks

# ---------------------------------------------------------------------------------------------------------------------
# How well scores agree with people


def accuracy_without_ties(human: torch.Tensor, margin: torch.Tensor) -> float:
    """Share of the pairs with a preference whose sign the margin has; ties are dropped, a margin of 0 is wrong.

    human (N,): +1 (A preferred), −1 (B), 0 (tie); margin (N,): r_A − r_B. NaN where every pair is a tie."""
    human, margin = torch.as_tensor(human), torch.as_tensor(margin)
    right = torch.sign(margin) == human
    return right[human != 0].double().mean().item()


def accuracy_with_ties(human: torch.Tensor, margin: torch.Tensor) -> float:
    """The best accuracy over thresholds ε, |margin| ≤ ε counting as "tie" (Deutsch et al. 2023, arXiv 2305.14324).

    human (N,) and margin (N,) as above; ε < 0, no tie at all, is among the thresholds. O(n log n)."""
    human, margin = torch.as_tensor(human), torch.as_tensor(margin)
    size, index = margin.abs().sort()
    human, margin = human[index], margin[index]
    as_tie = (human == 0).long()
    as_sign = ((torch.sign(margin) == human) & (human != 0)).long()
    # With the k smallest margins called ties, k right among them and the rest by sign; k must not split equal margins.
    right = torch.cat([as_tie.new_zeros(1), as_tie.cumsum(0)]) + as_sign.sum() - torch.cat(
        [as_sign.new_zeros(1), as_sign.cumsum(0)])
    whole = torch.ones(len(human) + 1, dtype=torch.bool)
    whole[1:-1] = size[1:] != size[:-1]
    return right[whole].max().item() / len(human) if len(human) else float("nan")


def measure(pairs: list[Pair], judged: dict[tuple[str, str], dict]) -> dict[str, float]:
    """Figures over pairs from the judgement of each (video, prompt) key; a figure stands only where it has a base:
    accuracies where there are labels, quality (the mean R_q) where there are reference sub-scores."""
    figures = {}
    human = torch.tensor([pair.human for pair in pairs])
    for field, suffix in (("reward", ""), ("reward_no_cot", "_no_cot")):
        if all(field in record for record in judged.values()):
            a, b = torch.tensor([[judged[key][field] for key in pair.videos()] for pair in pairs], dtype=torch.double).T
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


def evaluate(model: DeScore, pairs: list[Pair], ranks: Ranks, max_new_tokens: int, batch_size: int,
             workers: int = 0) -> dict[str, float]:
    """Judge every video of the pairs once, with a greedy CoT and without one, split over ranks, and measure."""
    keys = list(dict.fromkeys(key for pair in pairs for key in pair.videos()))
    mine = ranks.share(keys)
    judged = model.judge(mine, max_new_tokens, batch_size=batch_size, without_cot=True, workers=workers)
    judged = ranks.gather(list(tqdm(judged, "evaluate", total=len(mine), disable=not ranks.first, leave=False)))
    return measure(pairs, dict(zip(keys, judged)))


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def standardised(model: DeScore, reward: float) -> float | None:
    """A Bradley-Terry score has no scale of its own: in standard deviations from the mean of the held-out videos on
    which the model was last measured."""
    if not model.info.get("score_std"):
        return None
    return (reward - model.info["score_mean"]) / model.info["score_std"]


def describe(model: DeScore, record: dict) -> dict:
    """What is known of one judged video, as infer.py --json prints it."""
    cot = parse_cot(record["cot"])
    return {"video": record["video"], "prompt": record["prompt"], "reward": record["reward"],
            "standardised": standardised(model, record["reward"]), "truncated": record["truncated"],
            "format_ok": follows_format(record["cot"]), "scores": cot and cot["dimensional_scores"],
            "overall_score": cot and cot["overall_score"], "cot": record["cot"]}


def show(found: dict) -> str:
    """The same for a reader: the CoT, a table of sub-scores, the reward."""
    lines = [found["cot"].strip(), ""]
    if found["truncated"]:
        lines.append("(the CoT ran into the token limit and was scored as it stands)")
    if found["scores"]:
        lines += [f"{name:<12} {found['scores'][name]}" for name in DIMENSIONS]
    else:
        lines.append("(no sub-scores can be read from this CoT)")
    z = found["standardised"]
    lines.append(f"{'reward':<12} {found['reward']:+.4f}" + (f"   ({z:+.2f} standard deviations)" if z is not None else ""))
    return "\n".join(lines)


def default_model() -> str:
    """What the stages left behind: the model of stage 2, or else that of stage 1."""
    for run in ("runs/rl", "runs/coldstart"):
        if Path(run, "model").is_dir():
            return run
    raise DataError("no model in runs/: run `torchrun coldstart.py` and `torchrun rl.py` first, or pass --model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", metavar="VIDEO … PROMPT", help="one video or several, then their prompt")
    parser.add_argument("--model", help="a saved model or a run's folder [runs/rl, else runs/coldstart]")
    parser.add_argument("--pairs", help="a pair file to evaluate on instead")
    parser.add_argument("--out", type=Path, help="with --pairs: a file for the judgements, one JSON object a video")
    parser.add_argument("--max-new-tokens", type=int, default=4096, help="longest CoT")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token at each step")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling at a temperature above 0")
    parser.add_argument("--batch-size", type=int, default=16, help="videos at a time")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode videos ahead")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args()
    if bool(args.pairs) == bool(args.inputs) or len(args.inputs) == 1:
        parser.error("give videos and their prompt, or --pairs FILE")
    model = DeScore.load(args.model or default_model())
    keys = [(video, args.inputs[-1]) for video in args.inputs[:-1]]
    if args.pairs:
        pairs = read_pairs(args.pairs)
        keys = list(dict.fromkeys(key for pair in pairs for key in pair.videos()))
    judged = list(tqdm(model.judge(keys, args.max_new_tokens, args.temperature, args.seed, args.batch_size,
                                   without_cot=bool(args.pairs), workers=args.workers),
                       total=len(keys), unit="video", disable=len(keys) < 2))
    if args.pairs:
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text("".join(json.dumps(record) + "\n" for record in judged), encoding="utf-8")
        figures = measure(pairs, dict(zip(keys, judged)))
        print(json.dumps(figures) if args.json else "\n".join(f"{name:<24} {value:.4f}" for name, value in figures.items()))
        return
    found = [describe(model, record) for record in judged]
    if len(found) > 1:
        found.sort(key=lambda record: -record["reward"])
    if args.json:
        print(json.dumps(found if len(found) > 1 else found[0], ensure_ascii=False))
    elif len(found) > 1:
        print("\n".join(f"{place}. {record['reward']:+.4f}  {record['video']}" for place, record in enumerate(found, 1)))
    else:
        print(show(found[0]))


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        raise SystemExit(f"error: {error}") from error
