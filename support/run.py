"""What a run needs around its loop: its folder with the log, checkpoints and a lock; pairs and their
videos; what is said on the way.

Nothing here decides what a run does next: that stands in main of the stage. A run can be killed at any
moment and goes on, bit for bit on a CPU, as if it had not been: the data's order and every random
number are functions of (seed, step), and all else is in the checkpoint.
"""

import json
import math
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from data import (
    DIMENSIONS,
    Batch,
    DataError,
    Pair,
    Pairs,
    error_context,
    keys_of,
    make_instruction,
    per_video,
)
from infer import Thinking, evaluate
from model import OWN, DeScore
from support import digests
from support.above import from_above
from support.batches import read_ahead
from support.checkpoint import Checkpoints
from support.files import (
    amend,
    digest,
    lock,
    read_json,
    read_lines,
    remove,
    settle,
    sync,
    write_whole,
)
from support.formats import findings, read_pairs
from support.ranks import Ranks
from support.settings import FREE, FREE_IN, ROOT, RunArgs, function_file
from support.shard import shard

# By how much log π_θ may differ from log π_old before the first update. On the embedded default it
# was 8e-6 in float32 and 0.12 in bfloat16, whose 8 bits leave 0.25 between logits above 32.
ROUNDING, ROUNDING_HALF = 1e-3, 1.0
LOWER = re.compile("/.*(loss|truncated)")  # figures of which less is better
PATIENCE = 5  # so many updates in a row without a finite gradient end a run


class MicroBatch(NamedTuple):
    """Items of a step, such as pairs, that go through the model together."""

    items: list[Pair]
    # (items,) 1, or 0 for one that only keeps this rank in step with the others, or whose
    # video cannot be read.
    weight: Tensor
    batch: Batch  # their B videos: item 1's A, item 1's B, item 2's A, …
    rows: list[tuple[int, int]]  # of each video: the place of its item in the step's batch, its side
    row_weight: Tensor  # (B,) of each video's item


class Run:
    """The folder of a run: settings, log, checkpoints, model, and a lock that keeps a second run out."""

    def __init__(self, args: RunArgs, stage: str, ranks: Ranks):
        """stage: "coldstart" or "rl". Raises DataError where the folder cannot be one, or another run
        is at work in it."""
        self.args, self.stage, self.ranks = args, stage, ranks
        self.out = Path(args.out)
        self.items: Pairs | None = None  # what it trains on
        self.tests_looked_at = False
        self.digests: dict[str, str] = {}  # of what the run depends on, by name
        self.scale: dict = {}  # of the scores of the test set measured last
        self.stop_asked = False
        self.warned_of_ratio = False
        self.without_gradient = 0  # updates in a row
        # First steps in which no rollout kept the format; None once one did.
        self.without_format: int | None = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask_to_stop)
        names = ("metrics", "rollouts", "held_out")
        self.logs = [self.out / f"{name}.jsonl" for name in names]
        self.tracker = None
        if args.log and ranks.first:
            self.tracker = from_above("tools.trackers", "tracker")(args.log, self.out, asdict(args))
        self.checkpoints = Checkpoints(self.out / "checkpoints", args.keep, ranks)
        if ranks.first:
            self.open_folder()
            if args.embedded:
                prepare_toy(Path(args.train))
        ranks.wait()

    def open_folder(self) -> None:
        checkpoints = self.checkpoints.folder
        with error_context(f"{self.out}: cannot be a run's folder", OSError):
            checkpoints.mkdir(parents=True, exist_ok=True)
            self.lock = (self.out / "lock").open("w")
            lock(self.lock, f"{self.out}: another run is at work here", "lockf")
            for path in (self.out / "model", self.out / "best", checkpoints):
                settle(path)
            for left in list(checkpoints.glob("step-*.*")):
                settle(left.with_suffix(""))

    # -- before the loop

    def train_on(self, items: Pairs) -> None:
        """Keep in mind what the run trains on, pairs or other items as a file has them, and list those
        whose videos are missing. Raises DataError where these are more than --max-skipped allows."""
        self.items = items
        self.ranks.agree(self.deciding, self.args.train, keys_of(items))
        self.skipped = Skipped(self.out / "skipped.jsonl", items, self.args.max_skipped,
                               write=self.ranks.first)
        if self.ranks.first:
            sys.stderr.writelines(f"warning: {finding}\n" for finding in findings(items))

    @property
    def deciding(self) -> dict:
        """The settings that decide what is trained."""
        free = FREE | FREE_IN.get(self.stage, set())
        return {name: value for name, value in asdict(self.args).items() if name not in free}

    def say(self, text: str) -> None:
        """Print a line, once for all ranks."""
        if self.ranks.first:
            print(text, flush=True)

    def resume(self, model: DeScore, optimizer: torch.optim.Optimizer,
               **more: dict[str, Tensor]) -> int:
        """Restore the newest checkpoint, if any, and shorten the logs to it. Returns the step that it
        was made after, else 0.

        A checkpoint holds what trains, the optimiser's state, and `more`: tensors by kind and name that
        are restored in place, such as ema={name: average}."""
        args, first = self.args, self.ranks.first
        self.checkpoints.attach(model, optimizer, more)
        self.digests = self.make_digests(model)
        for rank, other in enumerate(self.ranks.gather([self.digests])):
            if names := digests.changed(self.digests, other):
                raise DataError(f"ranks {self.ranks.rank} and {rank} have not the same: {', '.join(names)}")
        state = {}
        if args.resume != "false":
            state = self.checkpoints.newest(self.deciding) or {}
            if not state and (self.out / "model").is_dir():
                raise DataError(f"{self.out}: holds a model and no checkpoint to go on from; give "
                                "another --out, or --resume false to begin anew")
            wrong = f"{self.checkpoints.folder}: a state.json is not as it was written"
            with error_context(wrong, LookupError, TypeError, AttributeError):
                if state:
                    self.check_digests(state)
                    changed = digests.changed(state.get("digests") or {}, self.digests)
                    if not any(name.startswith(digests.PAIRS) for name in changed):
                        self.skipped.restore(state["skipped"])  # its rows are this file's
        elif first:  # anew
            remove(self.checkpoints.folder)
            self.checkpoints.folder.mkdir()
        if first:
            if not state:
                remove(self.out / "best")  # it was chosen in another run
            for path in self.logs:
                cut(path, state.get(f"{path.stem}_bytes", 0))  # later steps are done again
            if self.tracker:
                self.tracker.begin(read_lines(self.logs[0]), anew=not state)
            if state:
                print(f"{self.out}: going on after step {state['step']}", flush=True)
        return state.get("step", 0)

    def make_digests(self, model: DeScore) -> dict[str, str]:
        """What the run depends on beside its settings, by the names that messages give it."""
        args = self.args
        sums = {
            f"{digests.PAIRS} ({args.train})": digests.of_pairs(self.items),
            f"the model it began from ({args.model})": digests.of_model(model, args.model),
            "the instruction": digests.of_json(model.processor.instruction),
        }
        asked = {"reward": getattr(args, "reward", []), "rollouts": [getattr(args, "rollouts", None)]}
        for what, functions in asked.items():
            for file in {function.rpartition(":")[0] for function in functions if function}:
                sums[f"the {what} file {file}"] = digest(function_file(file))
        return sums | digests.of_code(ROOT)

    def check_digests(self, state: dict) -> None:
        """Raises DataError, naming it, if what the run depends on is not what it was when the
        checkpoint with this state.json was made; with --resume insist it is only said."""
        step, before = state["step"], state.get("digests")
        if before is None:
            message = (f"the checkpoint of step {step} does not say with what code, pairs and model it was "
                       "made; whether they are the same is not known")
        elif names := digests.changed(before, self.digests):
            message = digests.say(names, step)
            if self.args.resume != "insist":
                raise DataError(f"{self.out}: {message}. --resume insist goes on all the same, "
                                "--resume false starts anew")
        else:
            return
        if self.ranks.first:
            print(f"warning: {self.out}: {message}", file=sys.stderr)

    def write_settings(self, model: DeScore, steps: int, **more) -> None:
        """Write settings.json for those who look at the run: its settings, number of steps, what the
        model judges, and `more`."""
        if not self.ranks.first:
            return
        about = {"stage": self.stage, "steps": steps, "settings": asdict(self.args),
                 "dimensions": model.processor.dimensions, "tags": model.processor.tags, **more}
        path = self.out / "settings.json"
        with error_context(f"{path}: could not be written", OSError):
            write_whole(path, json.dumps(about, indent=1) + "\n")

    # -- in the loop

    def read_ahead(self, plan: list[list[list]], model: DeScore) -> Iterator:
        """The videos of the steps of a plan (`plan_step`), decoded ahead by --workers processes."""
        groups = []
        for updates in plan:
            for micro_batches in updates:
                for micro in micro_batches:
                    groups.append([planned.item.videos() for planned in micro])
        return read_ahead(model.processor, groups, self.args.workers, self.args.max_prompt)

    def read(self, updates: list[list], videos: Iterator, model: DeScore) -> list[list[MicroBatch]]:
        """The micro-batches of a step's updates with their `videos`, the next of `read_ahead`. Items
        with a video that cannot be read are listed, and weigh nothing."""
        bad = []
        read = []
        for micro_batches in updates:
            read.append([])
            for micro in micro_batches:
                batch, errors = next(videos)
                items, places, weights = zip(*micro)
                for item, weight, error in zip(items, weights, errors):
                    if error and weight:
                        files, prompts = zip(*item.videos())
                        bad.append({"row": getattr(item, "row", None), "videos": [*files],
                                    "prompts": [*prompts], "error": error})
                weight = torch.tensor(weights) * torch.tensor([not error for error in errors])
                rows = []
                for item, place in zip(items, places):
                    rows += [(place, side) for side in range(len(item.videos()))]
                sides = torch.tensor([len(item.videos()) for item in items])
                row_weight = weight.repeat_interleave(sides)
                read[-1].append(MicroBatch(items, weight.to(model.device), batch, rows,
                                           row_weight.to(model.device)))
        self.skipped.add(self.ranks.gather(bad))
        return read

    def check_gradient(self, norm: float) -> None:
        """Raises DataError after `PATIENCE` updates in a row whose gradient's norm was not finite."""
        self.without_gradient = 0 if math.isfinite(norm) else self.without_gradient + 1
        if self.without_gradient >= PATIENCE:
            raise DataError(f"{self.out}: the gradients of {PATIENCE} updates in a row were "
                            "not finite; the last checkpoint is from before them. A smaller "
                            "--lr may help")

    def log(self, record: dict, name: str = "metrics") -> None:
        """Add a record to metrics.jsonl, whose figures go to a tracker as well (`--log`), or to
        another file; what is not finite becomes null."""
        if self.ranks.first:
            append(self.out / f"{name}.jsonl", [finite(record)])
            if name == "metrics" and self.tracker:
                self.tracker.send(record)

    def evaluate(self, step: int, model: DeScore, tests: dict[str, Pairs]) -> dict[str, float]:
        """Measure a model on the test sets, and log it. What it thinks about a set's first videos, the
        same each time, goes to held_out.jsonl."""
        args = self.args
        for pairs in tests.values() if not self.tests_looked_at else ():
            self.ranks.agree({}, pairs.path, keys_of(pairs))
            left_out = [pairs.summary()] if pairs.left_out else []
            found = left_out + findings(pairs, self.items) if self.ranks.first else []
            sys.stderr.writelines(f"warning: {finding}\n" for finding in found)
        self.tests_looked_at = True
        judged: dict[str, dict] = {}
        thinking = Thinking(args.max_new_tokens, args.eval_temperature, think_tokens=args.think_tokens)
        figures = evaluate(model, tests, self.ranks, thinking, args.workers, judged)
        self.log({"step": step, **figures})
        self.scale = {}
        for name, pairs in tests.items():
            references = dict(zip(keys_of(pairs), per_video(pairs, "scores")))
            for key in list(references)[: args.keep_rollouts]:
                if "error" not in judged[name][key]:
                    record = {"step": step, "test": name, **judged[name][key]}
                    self.log(record | {"reference": references[key]}, "held_out")
            if f"{name}/score_mean" in figures:  # the last set that has it gives the model its scale
                records = judged[name].values()
                scores = [record["score"] for record in records if "error" not in record]
                self.scale = {part: figures[f"{name}/{part}"] for part in ("score_mean", "score_std")}
                self.scale["score_quantiles"] = quantiles(scores)
        return figures

    def ask_to_stop(self, number, frame) -> None:
        """A first signal asks for an orderly end after this step; a second is not waited for."""
        self.stop_asked = True
        signal.signal(number, signal.SIG_DFL)

    def asked_to_stop(self) -> bool:
        """Whether a signal has asked any rank to stop."""
        (asked,) = self.ranks.sum([float(self.stop_asked)])
        return bool(asked)

    def save(self, step: int) -> None:
        """Write a checkpoint of all that `resume` was given."""
        state = {"args": asdict(self.args), "digests": self.digests,
                 "skipped": self.skipped.records}
        if self.ranks.first:
            for path in self.logs:
                with error_context(f"{path}: could not be written", OSError):
                    sync(path)  # the checkpoint is not to outlive what it goes with
                state[f"{path.stem}_bytes"] = path.stat().st_size
        self.checkpoints.save(step, state)

    def save_if_best(self, step: int, model: DeScore, figures: dict[str, float]) -> None:
        """With --keep-best: write the model to best/ if its figure is better than that of the model
        there; NaN never is, and of equal ones the earlier stays. Raises DataError for no such figure."""
        name = self.args.keep_best
        path = self.out / "best/descore.json"
        if not name:
            return
        best = self.ranks.ask_first(lambda: read_json(path).get("best", {}) if path.is_file() else {})
        before = best["value"] if best.get("figure") == name else math.nan
        if math.isnan(before) and name not in figures:
            raise DataError(f"--keep-best {name}: evaluations have no such figure, but {', '.join(figures)}")
        value = figures.get(name, math.nan)
        sign = -1 if LOWER.search(name) else 1
        if math.isnan(value) or sign * value <= sign * before:
            return
        test, _, _ = name.partition("/")
        best = {"step": step, "figure": name, "value": value, "test": test}
        info = dict(model.info)
        self.save_model(model, "best", best=best, **self.scale)
        model.info = info  # what is said of this model is not true of later ones
        self.say(f"{path.parent}: step {step}, {name} {value:.4g} (chosen on test {test!r})")

    # -- after the loop

    def stopped(self, step: int, last: int) -> None:
        """The end of a run that a signal has stopped."""
        self.say(f"{self.out}: stopped after step {step} of {last}; the same command goes on from here")
        self.close()

    def save_model(self, model: DeScore, place: str = "model", **more) -> None:
        """Write the model to the run's folder, with `more` in its descore.json."""
        with self.writing_model(place):
            model.save(self.out / place, self.ranks.first, stage=self.stage, args=asdict(self.args), **more)

    def finish(self, figures: dict[str, float]) -> None:
        """The end of a run, whose last evaluation gave `figures`, and the saved model its scale."""
        if self.ranks.first:
            with self.writing_model():
                amend(self.out / "model/descore.json", **self.scale)
            print(json.dumps(finite(figures), indent=1))
            print(f"{self.out}: done")
        self.close()

    def writing_model(self, place: str = "model"):
        return error_context(f"{self.out / place}: could not be written", OSError, SafetensorError)

    def close(self) -> None:
        if self.tracker:
            self.tracker.end()
        self.ranks.stop()

    # -- what is said of rollouts

    def warn_of_ratio(self, step: int, figures: dict[str, float], dtype: torch.dtype) -> None:
        """Warn, once, where ρ before a step's first update is not 1 but for the rounding of a type.
        figures: the step's, of which `logp_gap` says by how much log-probabilities differ."""
        gap = figures.get("logp_gap", 0.0)
        bound = ROUNDING_HALF if dtype in (torch.bfloat16, torch.float16) else ROUNDING
        if self.ranks.first and not (self.warned_of_ratio or gap <= bound):
            self.warned_of_ratio = True
            print(f"warning: step {step}: before its first update the policy's log-probabilities differ "
                  f"by up to {gap:.3g} from those that sampling recorded, and rounding makes up to "
                  f"{bound:g}: ρ is not 1. `logp_gap` in the log has all steps", file=sys.stderr)

    def warn_of_format(self, figures: dict[str, float], steps: int, example: str) -> None:
        """Warn, once, where in so many first steps no rollout has kept the format, and show one: R_f
        and R_q are 0 then, and nobody would know. figures: the step's; R_f is NaN where there were no
        rollouts."""
        if self.without_format is None:
            return
        kept = figures.get("reward_format", 1.0)
        self.without_format = self.without_format + 1 if kept == 0 else None
        if self.ranks.first and self.without_format == steps:
            beginning = json.dumps(example[:300], ensure_ascii=False)
            print("warning: no rollout of the first steps keeps the format, so R_f is 0 for all. "
                  f"One of them is {beginning}", file=sys.stderr)


def due(step: int, every: int) -> bool:
    """Whether something is to be done after this step that is done every so many; 0: never."""
    return every > 0 and step % every == 0


def progress(stage: str, done: int, last: int, ranks: Ranks) -> tqdm:
    """The steps from `done` + 1 to `last`, with a progress bar."""
    steps = range(done + 1, last + 1)
    return tqdm(steps, stage, last, initial=done, disable=not ranks.first)


def show(bar: tqdm, figures: dict[str, float], *names: str) -> None:
    """Show figures of these names beside a progress bar."""
    bar.set_postfix({name: f"{figures[name]:.3f}" for name in names if name in figures})


def prepare(model: DeScore, args: RunArgs, ranks: Ranks) -> None:
    """Make a model ready to train: checkpointing of activations, shards, the budget of its forwards.
    Raises DataError for settings that do not go together."""
    if args.gradient_checkpointing:
        checkpoint_activations(model.qwen)
    if args.shard and args.lora_rank:
        raise DataError("--shard full splits a model of which all trains: it needs "
                        "--lora-rank 0; adapters are small and need no splitting")
    if args.shard and ranks.world == 1 and not dist.is_initialized():
        raise DataError("--shard full needs torchrun, which starts the ranks to split over: "
                        "torchrun --nproc_per_node N …; or --shard none")
    if args.shard and args.optim == "adamw8bit":
        raise DataError("--optim adamw8bit does not work on sharded parameters")
    if args.shard:
        shard(model)
    model.max_tokens = args.max_tokens
    if model.reference:
        model.reference.max_tokens = args.max_tokens
    # What trains here is scored in our layout, and on a scale of its own; a note was about what it was.
    for old in ("scoring_layout", "score_mean", "score_std", "score_quantiles", "best", "note"):
        model.info.pop(old, None)
    if ranks.first:
        print(*summary(model), sep="\n")


def check_said(path: str, pairs: list[Pair], field: str, what: str) -> None:
    """DataError, that a pair has no `what`, unless each says `field`, such as "cot", of all its videos."""
    for pair in pairs:
        if None in pair.said(field):
            video, _ = pair.videos()[0]
            raise DataError(f"{path}: the pair of {video} has no {what}")


def prepare_toy(train: Path) -> None:
    """Render and annotate the clips of the embedded default on first use."""
    if not train.is_file():
        print(f"{train.parent}: rendering the clips of the embedded default (once)", flush=True)
        with error_context(f"{train.parent}: cannot be made", subprocess.SubprocessError):
            subprocess.run([sys.executable, str(ROOT / "toy/prepare.py"), str(train.parent)], check=True)


def checkpoint_activations(qwen) -> None:
    """Keep little for the backward, which computes the rest again."""
    # Its name in transformers 5.19 is the second.
    enable = getattr(qwen, "activation_checkpointing_enable", None) or qwen.gradient_checkpointing_enable
    enable()


def quantiles(scores: list[float]) -> list[float]:
    """101 numbers: the lowest of some scores, what 1 % of them are below, … the highest."""
    values = torch.tensor(scores, dtype=torch.double)
    found = values.quantile(torch.linspace(0, 1, 101, dtype=torch.double))
    return [round(value, 4) for value in found.tolist()]


def append(path: Path, records: list[dict]) -> None:
    """Add records to a file of JSON lines. Raises DataError if it cannot be written."""
    lines = [json.dumps(record) + "\n" for record in records]
    with error_context(f"{path}: could not be written", OSError), path.open("a") as file:
        file.writelines(lines)


def cut(path: Path, size: int) -> None:
    """Shorten a file of JSON lines, made if it is not there, to the whole ones within `size`
    bytes."""
    with path.open("a+b") as file:
        file.seek(0)
        whole = file.read(size).rfind(b"\n") + 1
        if whole < size:  # it was so long when a line had just been written
            print(f"warning: {path}: some of its last lines are lost", file=sys.stderr)
        file.truncate(whole)


def finite(record: dict) -> dict:
    """The record with None, JSON's null, for numbers that are not finite."""
    odd = [k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
    return record | dict.fromkeys(odd)


def summary(model: DeScore) -> Iterator[str]:
    """What trains, with counts; what LoRA does not cover; what the model brings that is not data.py's."""
    kinds = {".lora_": "LoRA", "merger": "mergers", ".visual.": "vision tower"}
    counts = Counter()
    for name, parameter in model.trainable().items():
        kind = next((kinds[part] for part in kinds if part in name), "language model")
        kind = "[Reward] and head" if name.startswith(OWN) else kind
        counts[kind] += parameter.numel()
    total = sum(p.numel() for p in model.parameters())
    trains = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
    yield f"{trains} parameters train, of {total:,}"
    if "LoRA" in counts:
        yield f"LoRA leaves as they are, beside the tower: {', '.join(without_adapter(model))}"
    processor = model.processor
    if processor.dimensions != DIMENSIONS:
        yield f"{model.name} has dimensions of its own: {', '.join(processor.dimensions)}"
    if processor.instruction != make_instruction(processor.dimensions, processor.tags):
        yield f"{model.name} is asked with an instruction of its own"


def without_adapter(model: DeScore) -> list[str]:
    """The matrices of the language model that have no adapter, such as embeddings, or the experts of
    another backbone; * stands for the number of a layer."""
    names = {}  # in their order
    for name, parameter in model.qwen.named_parameters():
        adapted = ".lora_" in name or ".base_layer." in name
        if parameter.ndim > 1 and not adapted and ".visual." not in name:
            name = name.removeprefix("model.language_model.").removesuffix(".weight")
            names[re.sub(r"\.\d+\.", ".*.", name)] = None
    return list(names)


class Skipped:
    """The pairs that training leaves out because a video cannot be read: listed in a file, and
    bounded. A pair is one by its row in the pair file, however often it is met."""

    def __init__(self, path: Path, pairs: Pairs, limit: float, write: bool = True):
        """limit: the largest share of the file's pairs that may be left out, those with
        missing videos included."""
        self.path, self.write, self.records, self.limit = path, write, [], limit
        missing = [row for row in pairs.left_out if row["reason"] == "missing"]
        self.total = len(pairs) + len(missing)
        self.missing = [
            {"row": row["row"], "videos": [row["detail"]], "error": "missing"} for row in missing]
        self.restore([])

    def restore(self, records: list[dict]) -> None:
        """List what is missing now and, as a checkpoint has it, what else could not be read, and no
        others. Raises DataError past the limit."""
        self.records = []
        if self.write:
            cut(self.path, 0)
        self.add(self.missing + [record for record in records if record["error"] != "missing"])

    def add(self, bad: list[dict]) -> None:
        """List some more, but those that were met before: in an earlier epoch, the same batch, or
        before a checkpoint. Raises DataError past the limit."""
        met = {identity(record) for record in self.records}
        new = []
        for record in bad:
            if identity(record) not in met:
                met.add(identity(record))
                new.append(record)
        if self.write:
            append(self.path, new)
        self.records += new
        if self.records and len(self.records) / self.total > self.limit:
            raise DataError(
                f"{len(self.records)} of {self.total} pairs have videos that cannot be read, "
                f"more than --max-skipped {self.limit:g} allows; they are listed in "
                f"{self.path}. The last: {self.records[-1]['error']}")


def identity(record: dict) -> str:
    """The row of a record of `Skipped`; of an item that has none its videos and prompts."""
    return str(record.get("row") or [record["videos"], record["prompts"]])


def read_tests(args: RunArgs, dimensions: dict[str, int]) -> dict[str, Pairs]:
    """The test sets of --test by the names of their files, under which their figures will stand."""
    tests = {Path(path).stem: path for path in args.test}
    if len(tests) < len(args.test):
        raise DataError(f"--test {' '.join(args.test)}: two files have the same name, and figures "
                        "go by it")
    return {name: read_pairs(path, args.label, args.root, dimensions) for name, path in tests.items()}
