"""Is the score about the right things? What becomes of it when the video is shown otherwise, or the
CoT is not about it.

    python -m tools.probe test.jsonl --model runs/rl --limit 100

Both videos of each pair are judged as they are, and again with a thing changed (`SHOWN`, `EXCHANGED`).
A change is the new score minus the old, in standard deviations of the scores; the score falls where
that is below −0.001, so that rounding is no fall. The table has, over videos, the mean change and
how often the score falls, and over pairs that are no ties how often the sign of the margin is the
label. Intervals are the bootstrap's, of 95 %, drawn by prompt: all videos and pairs of a prompt go
together.

Where the frames or the prompt are changed the model thinks anew; where the CoT is, it reads the video
as it is, and the old score is that behind its own CoT, read again in the same way. --json prints the
same as one object.
"""

import argparse
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import TAGS, Batch, DataError, Key, Pair, keys_of, overall_score, parse_cot, read_video
from infer import Thinking, add_thinking, by_key, read_thinking
from model import DeScore
from support import tables
from support.batches import THINK_TOKENS, chunks, deal_to_all, draw_seed, prompt_lengths
from support.command import READER, Count, not_empty, run_command
from support.files import MODELS, default_model
from support.formats import read_pairs
from support.ranks import ALONE, Ranks


class Seen(NamedTuple):
    """What a model is shown of a video."""

    frames: Tensor  # (T, 3, H, W) uint8, T even
    seconds: list[float]  # of each frame
    prompt: str


# A clip and the prompt of another pair → the clip that is shown in its place.
SHOWN: dict[str, Callable[[Seen, str], Seen]] = {
    "own": lambda clip, other: clip,
    "prompt_other": lambda clip, other: clip._replace(prompt=other),
    "prompt_empty": lambda clip, other: clip._replace(prompt=""),
    "reversed": lambda clip, other: clip._replace(frames=clip.frames.flip(0)),
    "first_frame": lambda clip, other: clip._replace(frames=clip.frames[:1].expand_as(clip.frames)),
    "fps_doubled": lambda clip, other: clip._replace(seconds=[s / 2 for s in clip.seconds]),
}
# Rows that score the video as it is behind another CoT; see `exchanged`.
EXCHANGED = ("cot_own", "cot_of_pair", "cot_other", "scores_false", "scores_all_2")
WORDS = {
    "own": "as it is",
    "again": "thought about once more, at the temperature of the spread",
    "prompt_other": "the prompt another pair's",
    "prompt_empty": "the prompt empty",
    "reversed": "the frames in reverse order",
    "first_frame": "each frame the first one",
    "fps_doubled": "the seconds halved, as if at twice the fps",
    "cot_own": "the CoT its own, read again",
    "cot_of_pair": "the CoT that of the pair's other video",
    "cot_other": "the CoT that of a video with another prompt",
    "scores_false": "each sub-score of the CoT another",
    "scores_all_2": "each sub-score of the CoT 2",
}
NOTHING = 0.001  # standard deviations; a smaller change is rounding
# What a sub-score is replaced by.
FALSE = {0: 2, 1: 0, 2: 0, "N/A": 1}
ALL_2 = {0: 2, 1: 2, 2: 2, "N/A": "N/A"}


# ------------------------------
# What is exchanged


def other_of(items: list, generator: random.Random) -> dict:
    """Another one for each of several different items, drawn at random; {} of a single one."""
    if len(items) < 2:
        return {}
    found = {}
    for place, item in enumerate(items):
        found[item] = items[(place + generator.randrange(1, len(items))) % len(items)]
    return found


def falsified(cot: str, new: dict, dimensions: dict, tags: tuple[str, str] = TAGS) -> str | None:
    """A CoT with each of its sub-scores replaced by what `new` has for it: in the JSON answer, and
    in the thought where a line says it in the form "subject: …, so 2". An overall_score becomes
    what the sub-scores now imply. None where the CoT has no sub-scores that can be replaced."""
    found = parse_cot(cot, dimensions, tags)
    if found is None:
        return None
    thought, opening, answer = cot.partition(f"<{tags[1]}>")
    wanted = {name: new[value] for name, value in found["dimensional_scores"].items()}
    for name, value in wanted.items():
        key = re.escape(json.dumps(name, ensure_ascii=False))
        line = rf"(?m)^((?:<{tags[0]}>)?[^\w\n]*{re.escape(name)}[^\w\n]*:.*\bso )(N/A|[012])\b"
        answer = put(rf'({key}\s*:\s*)("N/A"|"[012]"|[\d.]+)', json.dumps(value), answer)
        thought = put(line, str(value), thought)
    overall = overall_score(wanted, dimensions)
    if overall:
        answer = put(r'("overall_score"\s*:\s*)([\d.]+)', f"{overall:.1f}", answer)
    again = parse_cot(thought + opening + answer, dimensions, tags)
    if again is None or again["dimensional_scores"] != wanted:
        return None
    return thought + opening + answer


def put(pattern: str, value: str, text: str) -> str:
    """The text with a value in place of whatever stands behind the pattern's first group."""
    return re.sub(pattern, lambda match: match[1] + value, text)


def exchanged(pairs: list[Pair], cots: dict[Key, str], others: dict[str, str], dimensions: dict,
              generator: random.Random,
              tags: tuple[str, str] = TAGS) -> dict[str, dict[Key, str | None]]:
    """The CoTs that stand in the place of each key's own in each row of EXCHANGED; None where there
    is none to be had. A video of several pairs gets the CoT that belongs to its first."""
    partners, of_prompt = {}, {}
    for pair in pairs:
        a, b = pair.videos()
        partners.setdefault(a, b)
        partners.setdefault(b, a)
    for video, prompt in cots:
        of_prompt.setdefault(prompt, []).append((video, prompt))
    found = {name: {} for name in EXCHANGED}
    for key, cot in cots.items():
        strangers = of_prompt.get(others.get(key[1]), [])
        found["cot_own"][key] = cot
        found["cot_of_pair"][key] = cots.get(partners[key])
        found["cot_other"][key] = cots[generator.choice(strangers)] if strangers else None
        found["scores_false"][key] = falsified(cot, FALSE, dimensions, tags)
        found["scores_all_2"][key] = falsified(cot, ALL_2, dimensions, tags)
    return found


# ------------------------------
# Scores of what is shown


def read(model: DeScore, key: Key) -> list[Seen]:
    """A video with its prompt as it is seen for thinking; behind it as it is seen for scoring where
    that has a size of its own, as in the authors' layout. Raises DataError."""
    video, prompt = key
    settings, reader = [model.processor.settings], model.processor.reader
    if model.scoring_settings != settings[0]:
        settings.append(model.scoring_settings)
    return [Seen(*read_video(video, each, reader), prompt) for each in settings]


class Held:
    """A clip in the shape in which `data.open_video` takes a video. Whoever reads it with the
    settings with which the clip was read gets the same frames and seconds."""

    def __init__(self, clip: Seen, fps: float):
        self.clip = clip
        self.total = len(clip.frames)
        self.fps = fps * (1 - 1e-9)  # a hair less: rounding must not leave out the last frames
        self.seconds = clip.seconds

    def frames(self, indices: list[int]) -> Iterator[np.ndarray]:
        for index in indices:
            yield self.clip.frames[index].permute(1, 2, 0).numpy()


def encode(model: DeScore, clips: list[list[Seen]]) -> Batch:
    """A batch of videos as they are seen for thinking. What reads them again, for scoring, sees
    what is shown of them."""
    samples = []
    for clip in clips:
        held = Held(clip[-1], model.scoring_settings.fps)
        sample = model.processor.sample(*clip[0])
        samples.append(replace(sample, source=(held, clip[0].prompt)))
    return model.encode(model.processor.collate(samples))


def think(model: DeScore, clips: list[list[Seen]], seeds: list[int],
          thinking: Thinking) -> tuple[list[str], Tensor]:
    """The first CoT about each video, and the scores (B, samples) behind all."""
    thoughts = model.think(encode(model, clips), thinking.samples, thinking.max_new_tokens,
                           thinking.temperature, seeds=seeds)
    cots = []
    for tokens, mask in zip(thoughts.tokens[:, 0], thoughts.mask[:, 0]):
        cots.append(model.processor.decode(tokens[mask]))
    return cots, thoughts.scores


@torch.no_grad()
def shown(model: DeScore, keys: list[Key], others: dict[str, str], thinking: Thinking,
          ranks: Ranks = ALONE) -> Iterator[dict]:
    """Think about and score each (video, prompt) key in each of the ways of SHOWN; ranks share the
    work. With more thinking.samples than one also so many times as it is, at a temperature above 0.

    Yields a dict a key: video, prompt, cot, the score of each way by its name, and from samples
    `again`, the score behind the first, and their variance. Of a video that cannot be read:
    video, prompt, error."""
    # Each is shown with a stranger's prompt too, which may be longer than its own.
    strange = [(video, others.get(prompt, prompt)) for video, prompt in keys]
    lengths = prompt_lengths(model.processor, keys + strange, ranks)

    def judged(some: list[tuple[int, Key]]) -> list[dict]:
        clips, records, seeds, unread = [], [], [], []
        for number, key in some:
            record = {"video": key[0], "prompt": key[1]}
            try:
                clips.append(read(model, key))
            except DataError as error:
                unread.append(record | {"error": str(error)})
                continue
            records.append(record)
            seeds.append(draw_seed(thinking.seed, number))
        if not clips:
            return unread
        for name, change in SHOWN.items():
            if name == "prompt_other" and not others:
                continue
            changed = []
            for record, clip in zip(records, clips):
                changed.append([change(size, others.get(record["prompt"])) for size in clip])
            cots, scores = think(model, changed, seeds, replace(thinking, samples=1))
            for record, cot, found in zip(records, cots, scores[:, 0].tolist()):
                record[name] = found
                record.setdefault("cot", cot)  # the first way is as it is
        # So many thoughts take so many times the room.
        for rows in chunks(range(len(records)), max(1, len(records) // thinking.samples)):
            if thinking.samples > 1:
                spread = replace(thinking, temperature=thinking.temperature or 1.0)
                _, scores = think(model, [clips[row] for row in rows], [seeds[row] for row in rows],
                                  spread)
                for row, found in zip(rows, scores.double()):
                    records[row] |= {"again": found[0].item(), "variance": found.var().item()}
        tables.check_scores(model, records)
        return records + unread

    sizes = []
    for key, other in zip(keys, strange):
        sizes.append(max(lengths[key], lengths[other]) + thinking.max_new_tokens)
    groups = deal_to_all(list(enumerate(keys)), sizes, thinking.think_tokens, ranks.world)
    yield from ranks.hand_out(len(groups), lambda places: (judged(groups[place]) for place in places))


@torch.no_grad()
def behind(model: DeScore, cots: dict[str, dict[Key, str | None]],
           think_tokens: int = THINK_TOKENS, ranks: Ranks = ALONE) -> Iterator[dict]:
    """Score videos as they are behind CoTs, given by the name of a row and by key; ranks share the
    work. Yields a dict a key: video, prompt, and the score of each row that has a CoT for it."""
    keys = list(cots["cot_own"])
    lengths = prompt_lengths(model.processor, keys, ranks)

    def judged(some: list[Key]) -> list[dict]:
        clips = [read(model, key) for key in some]
        batch = model.watch(encode(model, clips))
        records = [{"video": video, "prompt": prompt} for video, prompt in some]
        for name, given in cots.items():
            texts = [given[key] for key in some]
            # What has none stands there with an empty one, which nobody looks at.
            scores = model.score(batch, [text or "" for text in texts]).tolist()
            for key, record, text, found in zip(some, records, texts, scores):
                if text is not None:
                    same = name != "cot_own" and text == cots["cot_own"][key]
                    record[name] = record["cot_own"] if same else found
        tables.check_scores(model, records)
        return records

    sizes = []
    for key in keys:
        longest = max(len(model.processor.encode_cot(given[key])) for given in cots.values())
        sizes.append(lengths[key] + longest)
    groups = deal_to_all(keys, sizes, think_tokens, ranks.world)
    yield from ranks.hand_out(len(groups), lambda places: (judged(groups[place]) for place in places))


# ------------------------------
# Figures


def mean(values: list[float], prompts: list[str], draws: int = 1000) -> dict:
    """The mean of values, how many there are, and the bootstrap's 95 % interval of it, drawn by
    prompt: those of a prompt stand or fall together. NaN of what has no base."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    values = torch.tensor(values, dtype=torch.double)
    where = torch.tensor([numbers[prompt] for prompt in prompts], dtype=torch.long)
    found = {"n": len(values), "mean": values.mean().item(), "interval": (math.nan, math.nan)}
    if len(numbers) < 2:
        return found
    sums = torch.zeros(len(numbers), dtype=torch.double).index_add(0, where, values)
    counts = torch.bincount(where).double()

    def drawn_mean(rows: Tensor) -> float:
        return (sums[rows].sum() / counts[rows].sum()).item()

    return found | {"interval": tables.bootstrap(drawn_mean, len(sums), draws)}


def figures(pairs: list[Pair], records: dict[Key, dict], model: DeScore, samples: int) -> dict:
    """What `shown` and `behind` found of both videos of each pair, as figures: a row for each way."""
    scores = [record["own"] for record in records.values()]
    std, whose = tables.scale(model, scores)
    found = {"pairs": len(pairs), "videos": len(records), "std": std, "std_of": whose, "rows": {}}
    for name, words in WORDS.items():
        base = "cot_own" if name in EXCHANGED else "own"
        some = [record for record in records.values() if name in record]
        prompts = [record["prompt"] for record in some]
        change = [(record[name] - record[base]) / (std or math.nan) for record in some]
        if not some:
            continue
        right, of_pair = [], []
        for pair in pairs:
            a, b = (records[key].get(name) for key in pair.videos())
            if pair.human and a is not None and b is not None:
                right.append(float((a > b) - (a < b) == pair.human))
                of_pair.append(pair.prompt)
        found["rows"][name] = {"what": words, "change": mean(change, prompts),
                               "falls": mean([float(x < -NOTHING) for x in change], prompts),
                               "accuracy": mean(right, of_pair)}
    if samples > 1:
        variances = [record["variance"] / (std or math.nan)**2 for record in records.values()]
        spread = mean(variances, [record["prompt"] for record in records.values()])
        found["spread"] = {"samples": samples, "n": spread["n"], "mean": math.sqrt(spread["mean"]),
                           "interval": tuple(math.sqrt(end) for end in spread["interval"])}
    return found


def show(found: dict) -> str:
    """The figures for a reader."""
    wide = max(len(row["what"]) for row in found["rows"].values())
    lines = [f"{found['videos']} videos of {found['pairs']} pairs; changes in standard deviations",
             f"of the scores, {found['std']:.4g}, {found['std_of']}", "",
             f"{'':{wide}}  videos  {'change':21}  {'falls':19}  accuracy"]
    for name, row in found["rows"].items():
        change, falls = with_interval(row["change"], "+"), with_interval(row["falls"])
        if name in ("own", "cot_own"):
            change = falls = "–"  # what the others are compared with
        lines.append(f"{row['what']:{wide}}  {row['change']['n']:6}  {change:21}  {falls:19}  "
                     f"{with_interval(row['accuracy'])}")
    lines.append("")
    if "spread" in found:
        lines.append(f"spread over {found['spread']['samples']} thoughts about a video: "
                     f"{with_interval(found['spread'])} standard deviations")
    lines.append(f"CoTs in which sub-scores stand in the thought too, and were replaced there as well: "
                 f"{found['scores_false_in_thought']}")
    return "\n".join(lines)


def with_interval(figure: dict, sign: str = "") -> str:
    if not math.isfinite(figure["mean"]):
        return "–"
    text = f"{figure['mean']:{sign}.2f}"
    if math.isfinite(figure["interval"][0]):
        low, high = figure["interval"]
        text += f" [{low:{sign}.2f}, {high:{sign}.2f}]"
    return text


# ------------------------------
# The command


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("pairs", help="a pair file of any known format")
    add("--model", type=not_empty, help=f"a saved model or a run's folder [{MODELS}]")
    add("--limit", type=Count, help="so many of the pairs, drawn at random [all]")
    add("--label", help="the preference's column [TA, else Overall]")
    add("--root", help="the folder that its paths are relative to [its own]")
    add("--instruction", help="a file with <video> and <prompt> in it [the model's own]; "
        "problem: the pair file's column")
    add_thinking(
        parser, repetition_penalty=None,
        samples={"default": 4, "help": "CoTs a video for the spread; 1: no spread"},
        temperature={"default": 0.0, "help": "0: the likeliest token; the spread is then at 1"},
        seed={"help": "of what is drawn: pairs, other prompts, CoTs"})
    add("--reader", **READER)
    add("--json", action="store_true", help="print JSON instead of text")
    return parser.parse_args()


def main() -> None:
    args, ranks = parse_args(), Ranks.start()
    model = DeScore.load(args.model or default_model(), reader=args.reader)
    model.check_head()
    model.processor.use_instruction(args.instruction)
    dimensions, generator = model.processor.dimensions, random.Random(args.seed)
    column = "problem" if args.instruction == "problem" else "prompt"
    pairs = read_pairs(args.pairs, args.label, args.root, dimensions, column)
    ranks.agree(vars(args), args.pairs, keys_of(pairs), model)
    if ranks.first:
        print(pairs.summary(), file=sys.stderr)
    if args.limit and args.limit < len(pairs):
        pairs = [pairs[row] for row in sorted(generator.sample(range(len(pairs)), args.limit))]
    keys = list(dict.fromkeys(keys_of(pairs)))
    others = other_of(list(dict.fromkeys(pair.prompt for pair in pairs)), generator)
    thinking = read_thinking(args)
    judged = shown(model, keys, others, thinking, ranks)
    records = by_key(tqdm(judged, "think", len(keys), unit="video", disable=not ranks.first))
    code = tables.list_unreadable(records if ranks.first else {})
    pairs, records, unreadable = tables.readable(pairs, records)
    if not pairs:
        raise DataError(f"{args.pairs}: no pair has two videos that can be read")
    own = {key: record["cot"] for key, record in records.items()}
    cots = exchanged(pairs, own, others, dimensions, generator, model.processor.tags)
    judged = behind(model, cots, thinking.think_tokens, ranks)
    for record in tqdm(judged, "score", len(own), unit="video", disable=not ranks.first):
        records[record["video"], record["prompt"]] |= record
    ranks.stop()
    if not ranks.first:
        return
    found = figures(pairs, records, model, args.samples) | unreadable
    answer = f"<{model.processor.tags[1]}>"
    found["scores_false_in_thought"] = sum(
        bool(false) and false.partition(answer)[0] != own[key].partition(answer)[0]
        for key, false in cots["scores_false"].items())
    print(tables.as_json(found) if args.json else show(found))
    sys.exit(code)


if __name__ == "__main__":
    run_command(main)
