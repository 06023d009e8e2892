"""Things to look at: a page of judged videos (`infer.py --report`), and the page of a run:

    python -m tools.report runs/rl                 # writes runs/rl/report.html
    python -m tools.report runs/rl --png figures   # its curves as PNG, for papers

A page is one file of HTML without network or framework; tools/page.html draws what is made here.
The page of a run can be made while the run goes on.
"""

import argparse
import base64
import bisect
import html
import json
import math
import os
import re
import time
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import av
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (
    DIMENSIONS,
    TAGS,
    DataError,
    Pair,
    VideoSettings,
    check_reader,
    error_context,
    is_number,
    parse_cot,
    read_video,
)
from support.batches import done_ahead
from support.command import READER, Whole, run_command
from support.files import read_json, read_lines, write_whole
from support.tables import describe, further, plain

TEMPLATE = Path(__file__).with_name("page.html")
BINS = 24  # of a histogram


# ------------------------------
# A page


def page_path(text: str, *others: str | Path | None) -> Path:
    """The type of a flag that names a page to write, and none of the `others` that a command reads or
    writes. That it cannot be written is said before the work, not after it."""
    path = Path(text)
    for made in (text, f"{text}.partial"):  # as `write_whole` has it
        if os.path.realpath(made) in [os.path.realpath(other) for other in others if other]:
            raise argparse.ArgumentTypeError(f"{text!r} would be written over {made}")
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a page (.html)")
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: nothing can be put into {folder}")
    return path


def write(path: Path, title: str, page: dict, strips: list[dict]) -> None:
    """Write a page: what it shows, and the frames of its videos, which stand apart so that each is
    read only when it is seen. Raises DataError if it cannot be written."""
    parts = []
    for number, strip in enumerate(strips):
        parts.append(f'<script type="application/json" id="strip-{number}">{as_text(strip)}</script>')
    title = html.escape(title).encode("ascii", "xmlcharrefreplace").decode()
    values = {"title": title, "page": as_text(page), "strips": "\n".join(parts)}
    # In one pass: what stands in a value is not looked at again.
    text = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], TEMPLATE.read_text(encoding="utf-8"))
    with error_context(f"{path}: could not be written", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)


def as_text(value) -> str:
    """JSON that can stand in a <script>: ASCII, in which no tag and no comment begins."""
    return json.dumps(plain(value), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def film(videos: list[dict], settings: VideoSettings, workers=0, reader="av") -> list[dict]:
    """A strip for each file that the `videos` of a page name: frames that the model saw, as small JPEG,
    with their seconds; the more videos, the smaller. Where a video cannot be read, what is wrong with
    it. The number of its strip is put into each of `videos`."""
    numbers = {}
    for video in videos:
        video["strip"] = numbers.setdefault(video["video"], len(numbers))
    files = list(numbers)
    count, height = (16, 160) if len(files) <= 12 else (8, 96) if len(files) <= 200 else (6, 64)
    cut = partial(strip, settings=settings, count=count, height=height, reader=reader)
    strips = done_ahead(cut, files, workers)
    return list(tqdm(strips, "frames", len(files), unit="video", disable=len(files) < 100))


def strip(video: str, settings: VideoSettings, count: int, height: int, reader="av") -> dict:
    """At most `count` of the frames that the model sees of a video, as high as that at most."""
    try:
        frames, seconds = read_video(video, settings, reader)
    except DataError as error:
        return {"error": str(error)}
    total, (h, w) = len(frames), frames.shape[2:]
    chosen = torch.linspace(0, total - 1, min(count, total)).round().long().tolist()
    size = (height, max(1, round(w * height / h))) if h > height else (h, w)
    small = F.interpolate(frames[chosen].float(), size, mode="bilinear", antialias=True)
    small = small.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    return {"frames": [base64.b64encode(jpeg(frame)).decode() for frame in small],
            "seconds": [round(seconds[index], 2) for index in chosen],
            "total": total, "width": size[1], "height": size[0], "seen": [w, h]}


def jpeg(frame) -> bytes:
    """A picture (H, W, 3) uint8 as JPEG."""
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.height, encoder.width = frame.shape[:2]
    encoder.pix_fmt, encoder.time_base = "yuvj420p", Fraction(1, 25)
    encoder.options = {"qmin": "4", "qmax": "4"}  # 2 is best, 31 worst
    picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuvj420p")
    return b"".join(map(bytes, [*encoder.encode(picture), *encoder.encode(None)]))


# ------------------------------
# Judged videos


def write_page(path: Path, model, judged: dict, pairs: list[Pair] | None = None,
               figures: dict | None = None, workers: int = 0) -> None:
    """The page of what a model has judged: `judged` by (video, prompt) key, of a pair file with its
    pairs and the figures of `infer.report`. Raises DataError if it cannot be written."""
    keys, videos = list(judged), []
    scale, scale_of = held_out_scores(model, judged, pairs)
    for record in judged.values():
        found = dict(record) if "error" in record else describe(model, record)
        if numbers := further(found):
            found["further"] = numbers
        score = found.get("score")
        if score is not None and scale:
            found["below"] = bisect.bisect_left(scale, score) / len(scale)
        videos.append(found)
    strips = film(videos, model.processor.settings, workers, model.processor.reader)
    page = {"kind": "judged", "title": f"{len(keys)} videos, judged by {model.name}",
            "dimensions": list(model.processor.dimensions), "videos": videos,
            "scale": histogram(scale) | {"of": scale_of} if scale else None}
    if pairs is None:
        page["title"] = page["title"] if len(keys) > 1 else f"A video, judged by {model.name}"
    else:
        number = {key: i for i, key in enumerate(keys)}
        page["title"] = f"{len(pairs)} pairs of {getattr(pairs, 'path', 'a file')}, judged by {model.name}"
        page |= {"pairs": [compare(pair, number, videos) for pair in pairs], "figures": figures}
    write(path, page["title"], page, strips)


def held_out_scores(model, judged: dict, pairs: list[Pair] | None) -> tuple[list[float], str]:
    """Scores, rising, among which one of the page stands, and of what they are: those of the page, where
    it is of a pair file, else those that the model's last held-out videos got, as descore.json has
    them; none where neither says anything."""
    records = [record for record in judged.values() if "error" not in record]
    has_cot = all("cot" in record for record in records)
    own = sorted(record["score"] if has_cot else record["score_no_cot"] for record in records)
    if pairs is not None and len(own) >= 10:
        return own, f"the {len(own)} videos of this page"
    known = model.info.get("score_quantiles") or []
    if has_cot and all(is_number(value) and math.isfinite(value) for value in known):
        # As many between each two of them as between any others.
        return [(a + b) / 2 for a, b in pairwise(known)], "the held-out videos of its training"
    return [], ""


def histogram(values: list[float]) -> dict:
    """How many values lie in each of BINS equal bins from the lowest to the highest."""
    low, high = min(values), max(values)
    counts = [0] * BINS
    for value in values:
        counts[min(int((value - low) / ((high - low) or 1) * BINS), BINS - 1)] += 1
    return {"low": low, "high": high, "counts": counts}


def compare(pair: Pair, number: dict, videos: list[dict]) -> dict:
    """A pair of the page: the numbers of its videos, the label, and whether the scores meet it."""
    sides = []
    for name, key in zip("ab", pair.videos()):
        sides.append({"video": number[key], "generator": getattr(pair, f"model_{name}"),
                      "reference": getattr(pair, f"scores_{name}")})
    found = {"prompt": pair.prompt, "preference": pair.preference, "sides": sides}
    a, b = (videos[side["video"]].get("score") for side in sides)
    if a is None or b is None:
        return found | {"verdict": "unreadable", "margin": None, "wrong": None}
    margin, human = a - b, pair.human
    met = "tie" if human == 0 else "right" if margin * human > 0 else "wrong"
    return found | {"verdict": met, "margin": margin, "wrong": how_wrong(human, margin)}


def how_wrong(human: int, margin: float) -> float:
    """The Bradley-Terry loss of a pair, of which a tie is half either way."""
    def loss(z: float) -> float:  # −log σ(z)
        return max(-z, 0.0) + math.log1p(math.exp(-abs(z)))

    return loss(human * margin) if human else (loss(margin) + loss(-margin)) / 2


# ------------------------------
# A run


class Panel(NamedTuple):
    """Curves that are drawn together."""

    title: str
    says: str
    names: list[str]  # patterns of figures' names; one that begins with - leaves out


PANELS = [
    Panel("Reward", "what the rules give a rollout, and its parts", ["reward", "reward_*", "-reward_range"]),
    Panel("Sub-scores matched", "R_q of held-out CoTs, and of rollouts", ["*/quality", "reward_quality"]),
    Panel("Held-out accuracy", "of preferences without ties: by the score, by that without a CoT, and by "
          "what the CoTs say", ["*/accuracy", "*/accuracy_no_cot", "*/accuracy_reading"]),
    Panel("Held-out accuracy, ties too", "at the best threshold", ["*/accuracy_ties*"]),
    Panel("Pair loss", "Bradley-Terry, of the pairs trained on; log 2 knows nothing", ["bt_loss"]),
    Panel("Pairs in order", "share of the pairs trained on whose preferred video scores higher",
          ["bt_accuracy", "accuracy"]),
    Panel("Margin", "r_w − r_l of the pairs trained on", ["margin"]),
    Panel("Signal", "rewards' range and spread in a group, and the share of groups in which all are equal",
          ["reward_range", "advantage_spread", "no_signal"]),
    Panel("KL to π_ref", "how far the policy is from stage 1, a token", ["kl"]),
    Panel("Clipped", "share of the tokens whose ρ is clipped", ["clip_fraction"]),
    Panel("Entropy", "a token, of what was sampled", ["entropy"]),
    Panel("Length of a CoT", "tokens", ["cot_tokens"]),
    Panel("Formats", "share of held-out CoTs that keep it, and of those cut off",
          ["*/format_rate", "*/truncated", "truncated"]),
    Panel("Loss", "what is descended", ["loss", "grpo_loss"]),
    Panel("Gradient norm", "before clipping", ["grad_norm"]),
    Panel("Updates left out", "share of them whose gradient was not finite", ["left_out"]),
    Panel("Learning rate", "", ["lr"]),
    Panel("π_θ against π_old", "before a batch's first update: the largest |log ρ|, 0 but for rounding",
          ["logp_gap"]),
    Panel("Largest ρ", "before a batch's first update: 1 but for rounding", ["ratio_max"]),
    Panel("Held-out scores", "their mean and standard deviation", ["*/score_mean", "*/score_std"]),
    Panel("Seconds", "a step", ["seconds", "seconds_*"]),
]


class RunFolder:
    """What a run has written so far. Raises DataError if that is not a run's folder, or a line of its
    logs is not as it was written."""

    def __init__(self, path: Path):
        self.path, metrics = path, path / "metrics.jsonl"
        if not metrics.is_file():
            raise DataError(f"{path}: not a run's folder, it has no metrics.jsonl")
        about = path / "settings.json"
        self.about = read_json(about) if about.is_file() else {}
        with error_context(f"{about}: not as it was written", TypeError, ValueError):
            self.dimensions = dict(self.about.get("dimensions") or DIMENSIONS)
            self.tags = tuple(self.about.get("tags") or TAGS)
        self.records = numbered(metrics)
        self.written = metrics.stat().st_mtime
        self.curves = curves(self.records)
        self.steps = max((record["step"] for record in self.records), default=0)

    @property
    def settings(self) -> VideoSettings:
        """How its videos become frames."""
        given = self.about.get("settings", {})
        names = ("fps", "min_pixels", "max_pixels")
        with error_context(f"{self.path / 'settings.json'}: not as it was written", TypeError):
            return VideoSettings(**{name: given[name] for name in names if name in given})

    def panels(self) -> list[tuple[Panel, dict[str, list]]]:
        """The panels for which there are figures, with their curves; a figure that none of ours
        has, such as a user's own, gets one of its own."""
        found, shown = [], set()
        for panel in PANELS:
            names = {}
            for pattern in panel.names:
                if pattern.startswith("-"):
                    names.pop(pattern[1:], None)
                names |= dict.fromkeys(name for name in self.curves if fnmatchcase(name, pattern))
            shown |= names.keys()
            found.append((panel, {name: self.curves[name] for name in names}))
        for name in self.curves.keys() - shown:
            found.append((Panel(name, "", [name]), {name: self.curves[name]}))
        order = {name: i for i, name in enumerate(self.curves)}
        found[len(PANELS):] = sorted(found[len(PANELS):], key=lambda one: order[one[0].title])
        return [(panel, of) for panel, of in found if of]


def numbered(path: Path) -> list[dict]:
    """The records of a log, each of which has a step."""
    records = read_lines(path)
    for row, record in enumerate(records, 1):
        if type(record.get("step")) is not int:
            raise DataError(f"{path}, row {row}: it has no step")
    return records


def curves(records: list[dict]) -> dict[str, list]:
    """The curve of each figure by its name: [step, value or None where it was not finite], rising. Of
    a step that stands there twice the later counts."""
    found: dict[str, dict] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and (value is None or is_number(value)):
                found.setdefault(name, {})[record["step"]] = value
    return {name: [list(point) for point in sorted(points.items())] for name, points in found.items()}


def thoughts(run: RunFolder) -> tuple[list[dict], list[dict]]:
    """The videos that the run has written thoughts about, held-out ones first, and those thoughts: of a
    video at a step, one or a group."""
    videos, numbers, found = {}, {}, []
    for record in numbered(run.path / "held_out.jsonl") + numbered(run.path / "rollouts.jsonl"):
        with error_context(f"{run.path}: a record of its thoughts is not as it was written",
                       KeyError, TypeError, AttributeError):
            key = record["video"], record["prompt"], record.get("test")
            if not all(isinstance(part, str) for part in key[:2]):
                raise TypeError("the video or the prompt is no text")
            if key not in videos:
                numbers[key] = len(videos)
                videos[key] = {"video": key[0], "prompt": key[1], "test": key[2],
                               "reference": record.get("reference")}
            some = []
            for one in record.get("rollouts") or [record]:
                cot = parse_cot(one["cot"], run.dimensions, run.tags) or {}
                figures = {name: value for name, value in one.items() if is_number(value) and name != "step"}
                some.append({"cot": one["cot"], "sub_scores": cot.get("dimensional_scores"),
                             "figures": figures})
            found.append({"video": numbers[key], "step": record["step"], "thoughts": some})
    return list(videos.values()), found


def run_page(run: RunFolder, workers=0, reader="av") -> tuple[str, dict, list[dict]]:
    """The title of a run's page, what it shows, and its strips."""
    videos, found = thoughts(run)
    strips = film(videos, run.settings, workers, reader)
    drawn = []
    for panel, of in run.panels():
        series = [{"name": name, "points": points} for name, points in of.items()]
        drawn.append({"title": panel.title, "says": panel.says, "series": series})
    title = f"{run.about.get('stage', 'Run')}: {run.path}"
    return title, {
        "kind": "run", "title": title, "step": run.steps, "steps": run.about.get("steps"),
        "written": run.written, "made": time.time(), "settings": run.about.get("settings"),
        "reward": run.about.get("reward"),
        "panels": drawn, "dimensions": list(run.dimensions), "videos": videos, "thoughts": found}, strips


def write_pngs(run: RunFolder, folder: Path) -> list[Path]:
    """Each panel of a run as a PNG. Raises DataError where matplotlib is not installed, or they cannot
    be written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # of --png alone
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("--png needs matplotlib: pip install matplotlib") from error
    written = []
    for panel, of in run.panels():
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        for name, points in of.items():
            steps, values = zip(*points)
            values = [math.nan if value is None else value for value in values]
            line = "o-" if "/" in name or len(points) < 3 else "-"
            axis.plot(steps, values, line, label=name, markersize=3, linewidth=1.4)
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if len(of) > 1:
            axis.legend(fontsize=7, frameon=False)
        written.append(folder / (re.sub(r"[^\w.]+", "-", next(iter(of))) + ".png"))
        with error_context(f"{written[-1]}: could not be written", OSError):
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(written[-1], dpi=200)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("run", type=Path, help="a run's folder")
    add("--out", type=page_path, help="the page [report.html in the run's folder]")
    add("--png", type=Path, metavar="DIR", help="write its curves as PNG there, and no page")
    add("--workers", type=Whole, default=0, help="processes that decode videos")
    add("--reader", **READER)
    args = parser.parse_args()
    check_reader(args.reader)
    run = RunFolder(args.run)
    if args.png:
        print("\n".join(map(str, write_pngs(run, args.png))) or f"{args.run}: nothing is logged yet")
        return
    out = args.out or args.run / "report.html"
    write(out, *run_page(run, args.workers, args.reader))
    print(out)


if __name__ == "__main__":
    run_command(main)
