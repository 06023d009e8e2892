"""What a run needs around the method: its folder, the loop's bookkeeping, the optimiser step.

Nothing here knows what is trained. A run can be killed at any moment and goes on, bit for bit on
a CPU, as if it had not been: the data's order and every random number are functions of
(seed, step), and all else is in the checkpoint.
"""

import fcntl
import json
import math
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

from data import Batch, DataError, Pair, Pairs, error_context, keys_of, per_video
from infer import Thinking, evaluate
from model import OWN, DeScore
from support import digests
from support.batches import deal, read_ahead
from support.checkpoint import Checkpoints
from support.files import amend, digest, read_lines, remove, settle, sync, write_whole
from support.formats import read_pairs
from support.ranks import Ranks
from support.settings import FREE, FREE_IN, ROOT, function_file, parse_args
from support.shard import local, shard
from tools.trackers import tracker

# By how much log π_θ may differ from log π_old before the first update. On the embedded default it
# was 8e-6 in float32 and 0.12 in bfloat16, whose 8 bits leave 0.25 between logits above 32.
ROUNDING, ROUNDING_HALF = 1e-3, 1.0
PATIENCE = 5  # so many updates in a row without a finite gradient end a run


class Unit(NamedTuple):
    """A pair in a step's plan."""

    pair: Pair
    place: int  # in its batch; what is random about it depends on (seed, step, place)


class MicroBatch(NamedTuple):
    """Some pairs of a step that go through the model together."""

    pairs: list[Pair]
    places: list[int]
    # (pairs,) 1, or 0 for a pair that only keeps this rank in step with the others, or
    # whose video cannot be read.
    weight: torch.Tensor
    batch: Batch  # their videos: pair 1's A, pair 1's B, pair 2's A, …


class Means:
    """Figures of a step, added up over micro-batches and ranks; each is logged by its name."""

    def __init__(self):
        # (name, update or None) → (Σ value · weight, Σ weight); of a total (Σ value, Σ weight)
        self.sums: dict[tuple[str, int | None], torch.Tensor] = {}
        self.most: dict[str, float] = {}  # name → the largest value
        self.update = 0  # of the step

    def add(self, weight=1.0, **figures) -> None:
        """Figures to be averaged; a weight of the same shape, or one for all."""
        for name, value in figures.items():
            value, by = torch.broadcast_tensors(numbers(value), numbers(weight))
            value = torch.where(by > 0, value * by, 0.0)
            self.put((name, None), value.sum(), by.sum())

    def total(self, weight=1.0, **figures) -> None:
        """Parts of figures that add up over an update; averaged over those of a step's updates
        in which any part had a weight."""
        for name, value in figures.items():
            self.put((name, self.update), numbers(value), numbers(weight).sum())

    def largest(self, **figures) -> None:
        """Figures of which the step's largest is logged; NaN, where there is one, is larger."""
        for name, value in figures.items():
            self.most[name] = larger(float(value), self.most.get(name, -math.inf))

    def put(self, key: tuple[str, int | None], value: torch.Tensor, weight: torch.Tensor) -> None:
        self.sums[key] = self.sums.get(key, 0.0) + torch.stack([value, weight])

    def take(self, ranks: Ranks) -> dict[str, float]:
        """The step's figures over all ranks; NaN where nothing had a weight."""
        flat = torch.cat(list(self.sums.values())).tolist()
        flat, found = ranks.sum(flat), {}
        for (name, update), value, weight in zip(self.sums, flat[::2], flat[1::2]):
            if update is not None:
                value, weight = (value, 1.0) if weight else (0.0, 0.0)
            before = found.get(name, (0.0, 0.0))
            found[name] = (before[0] + value, before[1] + weight)
        figures = {name: value / by if by else math.nan for name, (value, by) in found.items()}
        for name, value in chain.from_iterable(map(dict.items, ranks.gather([self.most]))):
            figures[name] = larger(value, figures.get(name, -math.inf))
        self.sums, self.most, self.update = {}, {}, 0
        return figures


def larger(a: float, b: float) -> float:
    return a if math.isnan(a) or a > b else b


def numbers(value) -> torch.Tensor:
    """A number or a tensor of any kind in float64 on the CPU, without its gradient."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
    return torch.as_tensor(value, dtype=torch.double)


class Run:
    """A run: its settings, its folder with the log, the checkpoints and a lock that keeps a
    second run out, and the loop's bookkeeping (`steps`)."""

    def __init__(self, Args: type, stage: str, shown: tuple[str, ...]):
        """stage: "coldstart" or "rl"; shown: the figures that the progress bar shows."""
        self.ranks, self.stage, self.shown = Ranks.start(), stage, shown
        self.args, embedded = parse_args(Args, stage)
        if self.args.model is None:
            raise DataError("--train needs --model: a Qwen3-VL, directory or hub id")
        self.out, self.means = Path(self.args.out), Means()
        self.stop_asked, self.warned, self.left_out = False, False, 0
        self.pairs: list[Pair] = []  # of --train, as they were read
        self.digests: dict[str, str] = {}  # of what the run depends on, by name
        self.scores: list[float] = []  # of the test set measured last
        self.kept: list[tuple[int, dict]] = []  # what the step leaves in rollouts.jsonl
        self.reward: dict[str, float] = {}  # the parts of R and their weights
        # First steps in which no rollout kept the format; None once one did. And one of the rollouts.
        self.without_format: int | None = 0
        self.example = ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask_to_stop)
        self.logs = [self.out / "metrics.jsonl", self.out / "rollouts.jsonl",
                     self.out / "held_out.jsonl"]
        self.tracker = tracker(self.args.log if self.ranks.first else None, self.out, asdict(self.args))
        checkpoints = self.out / "checkpoints"
        self.checkpoints = Checkpoints(checkpoints, self.args.keep, self.ranks)
        if self.ranks.first:
            self.open_folder(checkpoints)
            if embedded:
                self.prepare_toy()
        self.ranks.wait()

    def open_folder(self, checkpoints: Path) -> None:
        with error_context(f"{self.out}: cannot be a run's folder", OSError):
            checkpoints.mkdir(parents=True, exist_ok=True)
            self.lock = (self.out / "lock").open("w")
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when this dies
            except (BlockingIOError, PermissionError) as error:
                raise DataError(f"{self.out}: another run is at work here") from error
            for path in (self.out / "model", checkpoints):
                settle(path)
            for left in list(checkpoints.glob("step-*.*")):
                settle(left.with_suffix(""))

    def prepare_toy(self) -> None:
        """Render and annotate the clips of the embedded default on first use."""
        folder = Path(self.args.train).parent
        if not Path(self.args.train).is_file():
            print(f"{folder}: rendering the clips of the embedded default (once)", flush=True)
            command = [sys.executable, str(ROOT / "toy/prepare.py"), str(folder)]
            subprocess.run(command, check=True)

    def ask_to_stop(self, number, frame) -> None:
        """A first signal asks for an orderly end after this step; a second is not waited for."""
        self.stop_asked = True
        signal.signal(number, signal.SIG_DFL)

    # -- before the loop

    def prepare(self, model: DeScore, groups: list[dict],
                weight_decay: float) -> torch.optim.Optimizer:
        """Make the model ready to train: checkpointing of activations, shards, AdamW over
        groups of its parameters ({"params": names, "lr": rate})."""
        if self.args.gradient_checkpointing:
            checkpoint_activations(model.qwen)
        if self.args.shard and self.args.lora_rank:
            raise DataError("--shard full splits a model of which all trains: it needs "
                            "--lora-rank 0; adapters are small and need no splitting")
        if self.args.shard and self.ranks.world == 1 and not dist.is_initialized():
            raise DataError("--shard full needs torchrun, which starts the ranks to split over: "
                            "torchrun --nproc_per_node N …; or --shard none")
        if self.args.shard:
            shard(model)
        model.max_tokens = self.args.max_tokens
        # What trains here is scored in our layout, and on a scale of its own.
        for old in ("scoring_layout", "score_mean", "score_std", "score_quantiles"):
            model.info.pop(old, None)
        trainable = model.trainable()
        for group in groups:
            group["params"] = [trainable[name] for name in group["params"]]
        kind = torch.optim.AdamW
        if self.args.optim == "adamw8bit":  # moments of a quarter the size (arXiv 2110.02861)
            if self.args.shard:
                raise DataError("--optim adamw8bit does not work on sharded parameters")
            from bitsandbytes.optim import AdamW8bit as kind  # slow to import
        self.model, self.optimizer = model, kind(groups, weight_decay=weight_decay)
        if self.ranks.first:
            print(summary(model))
        return self.optimizer

    def read_train(self, field: str, what: str, ties: bool = True) -> list[Pair]:
        """The pairs to train on, the preferred video first, with ties or without. Each must have
        `field`, such as "cot", for both its videos; else DataError says that it has no `what`."""
        args, dimensions = self.args, self.model.processor.dimensions
        pairs = read_pairs(args.train, args.label, args.root, dimensions)
        self.pairs = pairs
        self.skipped = Skipped(self.out / "skipped.jsonl", pairs, args.max_skipped,
                               write=self.ranks.first)
        if self.ranks.first:
            count = sum(pair.preference == "tie" for pair in pairs)
            print(f"{pairs.summary()}; {count} of them ties, which have no winner")
        kept = [pair for pair in pairs if ties or pair.preference != "tie"]
        if not kept:
            raise DataError(f"{args.train}: nothing but ties, from which nothing is learnt here")
        for pair in kept:
            if getattr(pair, f"{field}_a") is None or getattr(pair, f"{field}_b") is None:
                raise DataError(f"{args.train}: the pair of {pair.video_a} has no {what}")
        return [pair.winner_first() for pair in kept]

    def deal(self, units: list[Unit], sizes: list[int], budget: int) -> list[list[tuple]]:
        """This rank's micro-batches of an update's units (`batches.deal`)."""
        return deal(units, sizes, budget, self.ranks)

    # -- the loop

    def steps(self, plan: list[list[list]]) -> Iterator[tuple[int, list[list[MicroBatch]]]]:
        """The steps that are still to do: each its number, from 1, and for each of its
        optimiser updates this rank's micro-batches. `plan` has them as `deal` gives them.

        Reads videos ahead, takes up a checkpoint, logs the step's means, evaluates, saves,
        and stops where a signal asked for it. At the end the model is saved and evaluated."""
        args, model, last = self.args, self.model, len(plan)
        tests = read_tests(args.test, args.label, args.root, model.processor.dimensions)
        done = self.take_up()
        self.say_what_it_is(last)
        batches = self.batches(plan[done:])
        if done == 0 and args.eval_before:
            self.evaluate(0, tests)
        model.train()
        progress = tqdm(range(done + 1, last + 1), self.stage, initial=done, total=last,
                        disable=not self.ranks.first)
        for step in progress:
            started = time.time()
            yield step, self.read(plan[step - 1], batches)
            figures = self.means.take(self.ranks)
            self.log({"step": step, **figures, "seconds": time.time() - started})
            self.warn_of_ratio(step, figures.get("logp_gap", 0.0))
            self.warn_of_format(figures.get("reward_format", 1.0), min(2, last))
            for _, record in sorted(self.ranks.gather(self.kept), key=lambda both: both[0]):
                self.log(record, "rollouts")
            self.kept = []
            progress.set_postfix({name: f"{figures[name]:.3f}" for name in self.shown})
            if args.eval_every and step % args.eval_every == 0 and step < last:
                self.evaluate(step, tests)
            if self.stops(step, last):
                self.tracker.end()
                return self.ranks.stop()
        reason = f"{self.out / 'model'}: could not be written"
        with error_context(reason, OSError, SafetensorError):
            model.save(self.out / "model", self.ranks.first, stage=self.stage, args=asdict(args))
        figures = self.evaluate(last, tests)
        scale = {}
        for name, value in figures.items():
            if "/score_" in name:  # mean and deviation of the last test set's scores
                scale[name.split("/")[1]] = value
        if self.ranks.first:
            scale |= {"score_quantiles": quantiles(self.scores)} if scale else {}
            with error_context(reason, OSError):
                amend(self.out / "model/descore.json", **scale)
            print(json.dumps(finite(figures), indent=1))
            print(f"{self.out}: done")
        self.tracker.end()
        self.ranks.stop()

    def take_up(self) -> int:
        """Restore the newest checkpoint, if any. Returns the step it was made after, else 0."""
        self.checkpoints.attach(self.model, self.optimizer)
        self.digests = self.ranks.ask_first(self.make_digests)
        state = None
        if self.args.resume != "false":
            free = FREE | FREE_IN.get(self.stage, set())
            settings = {k: v for k, v in asdict(self.args).items() if k not in free}
            state = self.checkpoints.newest(settings)
            if not state and (self.out / "model").is_dir():
                raise DataError(f"{self.out}: holds a model and no checkpoint to go on from; give "
                                "another --out, or --resume false to begin anew")
            if state:
                self.check_digests(state)
        elif self.ranks.first:
            remove(self.checkpoints.folder)
            self.checkpoints.folder.mkdir()
        if self.ranks.first:
            for path in self.logs:
                cut(path, state.get(f"{path.stem}_bytes", 0) if state else 0)  # later steps are done again
            if self.args.log:
                self.tracker.begin(read_lines(self.logs[0]), anew=not state)
            if state:
                print(f"{self.out}: going on after step {state['step']}", flush=True)
        if state:
            self.skipped.restore(state["skipped"])
        return state["step"] if state else 0

    def make_digests(self) -> dict[str, str]:
        """What the run depends on beside its settings, by the names that messages give it."""
        args = self.args
        found = {f"{digests.PAIRS} ({args.train})": digests.of_pairs(self.pairs),
                 f"the model it began from ({args.model})": digests.of_model(self.model, args.model),
                 "the instruction": digests.of_json(self.model.processor.instruction)}
        for asked in getattr(args, "reward", []):
            file = asked.rpartition(":")[0]
            found[f"the reward file {file}"] = digest(function_file(file))
        return found | digests.of_code(ROOT)

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

    def say_what_it_is(self, last: int) -> None:
        """Write settings.json for those who look at the run."""
        if self.ranks.first:
            about = {"stage": self.stage, "steps": last, "settings": asdict(self.args),
                     "dimensions": self.model.processor.dimensions,
                     "tags": self.model.processor.tags}
            if self.reward:
                about["reward"] = self.reward
            path = self.out / "settings.json"
            with error_context(f"{path}: could not be written", OSError):
                write_whole(path, json.dumps(about, indent=1) + "\n")

    def batches(self, plan: list[list[list]]) -> Iterator[tuple[Batch, list[str | None]]]:
        """The videos of a plan's micro-batches, decoded ahead."""
        groups = []
        for updates in plan:
            for micro_batches in updates:
                for micro in micro_batches:
                    groups.append([unit.pair.videos() for unit, _ in micro])
        return read_ahead(self.model.processor, groups, self.args.workers, self.args.max_prompt)

    def read(self, updates: list[list], batches: Iterator) -> list[list[MicroBatch]]:
        """A step's micro-batches with their videos. Pairs with a video that cannot be read
        are listed, and count for nothing."""
        found, bad = [], []
        for micro_batches in updates:
            found.append([])
            for micro in micro_batches:
                batch, errors = next(batches)
                units, weights = zip(*micro)
                for unit, weight, error in zip(units, weights, errors):
                    if error and weight:
                        videos = [unit.pair.video_a, unit.pair.video_b]
                        bad.append({"videos": videos, "error": error})
                weight = torch.tensor(weights) * torch.tensor([not error for error in errors])
                pairs, places = zip(*units)
                micro = MicroBatch(pairs, places, weight.to(self.model.device), batch)
                found[-1].append(micro)
        self.skipped.add(self.ranks.gather(bad))
        return found

    def sum(self, *numbers) -> list[float]:
        """Counts added up over all ranks, 1 where there is nothing: what a loss divides by."""
        return [max(total, 1.0) for total in self.ranks.sum([float(n) for n in numbers])]

    def descend(self, max_norm: float) -> None:
        """One optimiser step on the gradients of all ranks together, clipped to a norm; logs
        the norm before clipping. The losses divide by counts over all ranks, so that the sum
        of the ranks' gradients is the gradient of the global batch. An update whose gradient
        is not finite is left out; DataError after `PATIENCE` such in a row."""
        gradients = [p.grad for p in self.checkpoints.optimized if p.grad is not None]
        wholes = [grad for grad in gradients if local(grad) is grad]
        shards = [local(grad) for grad in gradients if local(grad) is not grad]
        if self.ranks.world > 1:
            for grad in shards:
                grad.mul_(self.ranks.world)  # FSDP has averaged over the ranks
            flat = torch.cat([grad.flatten() for grad in wholes])
            dist.all_reduce(flat)  # one message
            for grad, summed in zip(wholes, flat.split([grad.numel() for grad in wholes])):
                grad.copy_(summed.view_as(grad))
        norm = torch.nn.utils.get_total_norm(wholes).item()
        if shards:
            (squares,) = self.ranks.sum([torch.nn.utils.get_total_norm(shards).item() ** 2])
            norm = (norm**2 + squares) ** 0.5
        is_finite = math.isfinite(norm)
        if is_finite and norm > 0:  # where nothing counts, momentum and decay rest as well
            torch._foreach_mul_(shards + wholes, min(1.0, max_norm / (norm + 1e-6)))
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.means.update += 1
        self.means.add(grad_norm=norm, left_out=float(not is_finite))
        self.left_out = 0 if is_finite else self.left_out + 1
        if self.left_out >= PATIENCE:
            raise DataError(f"{self.out}: the gradients of {PATIENCE} updates in a row were "
                            "not finite; the last checkpoint is from before them. A smaller "
                            "--lr may help")

    def check_ratio(self, logps: torch.Tensor, old_logps: torch.Tensor,
                    learnt: torch.Tensor) -> None:
        """Log the largest ρ = π_θ / π_old of the `learnt` tokens, and how far apart the two
        log-probabilities are at most. Only in a step's first update is the policy that trains
        the one that sampled; later ones are not looked at. All (B, G, C)."""
        if self.means.update == 0 and learnt.any():
            log_ratio = (logps.detach() - old_logps)[learnt].double()
            self.means.largest(ratio_max=log_ratio.max().exp(), logp_gap=log_ratio.abs().max())

    def warn_of_ratio(self, step: int, gap: float) -> None:
        """Warn, once, where ρ before the first update is not 1 but for rounding."""
        half = self.model.dtype in (torch.bfloat16, torch.float16)
        bound = ROUNDING_HALF if half else ROUNDING
        if self.ranks.first and not (self.warned or gap <= bound):
            self.warned = True
            print(f"warning: step {step}: before its first update the policy's log-probabilities differ "
                  f"by up to {gap:.3g} from those that sampling recorded, and rounding makes up to "
                  f"{bound:g}: ρ is not 1. `logp_gap` in the log has all steps", file=sys.stderr)

    def say_reward(self, parts: dict[str, float]) -> None:
        """Say which R a run has, and keep it for settings.json: the weight of each function."""
        self.reward = parts
        if self.ranks.first:
            terms = [f"{weight:g} · {source}" for source, weight in parts.items()]
            print("R = " + " + ".join(terms))

    def warn_of_format(self, kept: float, steps: int) -> None:
        """Say, once, where in so many first steps no rollout has kept the format, and what one said:
        R_f and R_q are 0 then, and nobody would know. kept: the share of a step's rollouts; NaN
        where there were none."""
        if self.without_format is None:
            return
        self.without_format = self.without_format + 1 if kept == 0 else None
        if self.ranks.first and self.without_format == steps:
            beginning = json.dumps(self.example[:300], ensure_ascii=False)
            print("warning: no rollout of the first steps keeps the format, so R_f is 0 for all. "
                  f"One of them is {beginning}", file=sys.stderr)

    def keep_rollouts(self, step: int, micro: MicroBatch, texts: list[str],
                      figures: dict[str, torch.Tensor]) -> None:
        """Put the rollouts of a step's first videos aside for rollouts.jsonl. texts: B · G, figures
        (B, G) by name, of a micro-batch's B videos."""
        G = len(texts) // (2 * len(micro.pairs))
        self.example = texts[0]
        for i, (place, pair) in enumerate(zip(micro.places, micro.pairs)):
            for side, (video, prompt) in enumerate(pair.videos()):
                b, number = 2 * i + side, 2 * place + side
                if number < self.args.keep_rollouts and micro.weight[i]:
                    rollouts = []
                    for g, cot in enumerate(texts[b * G : (b + 1) * G]):
                        found = {name: value[b, g].item() for name, value in figures.items()}
                        rollouts.append({"cot": cot, **finite(found)})
                    reference = (pair.scores_a, pair.scores_b)[side]
                    record = {"step": step, "video": video, "prompt": prompt, "reference": reference}
                    self.kept.append((number, record | {"rollouts": rollouts}))

    def stops(self, step: int, last: int) -> bool:
        """Save a checkpoint where one is due. True if a signal has asked to stop."""
        (stop,) = self.ranks.sum([float(self.stop_asked)])
        due = self.args.save_every and step % self.args.save_every == 0
        if stop or step == last or due:
            state = {"args": asdict(self.args), "digests": self.digests,
                     "skipped": self.skipped.records}
            if self.ranks.first:
                for path in self.logs:
                    with error_context(f"{path}: could not be written", OSError):
                        sync(path)  # the checkpoint is not to outlive what it goes with
                    state[f"{path.stem}_bytes"] = path.stat().st_size
            self.checkpoints.save(step, state)
        if stop and self.ranks.first:
            print(f"{self.out}: stopped after step {step} of {last}; the same command goes on "
                  "from here", flush=True)
        return bool(stop)

    def evaluate(self, step: int, tests: dict[str, Pairs]) -> dict[str, float]:
        args, judged = self.args, {}
        thinking = Thinking(args.max_new_tokens, args.eval_temperature,
                            think_tokens=args.think_tokens)
        figures = evaluate(self.model, tests, self.ranks, thinking, args.workers, judged)
        self.log({"step": step, **figures})
        for name, pairs in tests.items():
            self.keep_held_out(step, name, pairs, judged[name])
        return figures

    def keep_held_out(self, step: int, name: str, pairs: Pairs, judged: dict) -> None:
        """Write what the policy thought about a test set's first videos to held_out.jsonl: the same
        videos each time, so that one can see how thinking changes. The set's scores are kept."""
        references = dict(zip(keys_of(pairs), per_video(pairs, "scores")))
        for key in list(references)[: self.args.keep_rollouts]:
            if "error" not in judged[key]:
                record = {"step": step, "test": name, **judged[key], "reference": references[key]}
                self.log(record, "held_out")
        self.scores = [record["score"] for record in judged.values() if "error" not in record]

    def log(self, record: dict, name: str = "metrics") -> None:
        """Add a record to metrics.jsonl, whose figures go to a tracker as well (`--log`), or to
        another file; what is not finite becomes null."""
        if self.ranks.first:
            append(self.out / f"{name}.jsonl", [finite(record)])
            if name == "metrics":
                self.tracker.send(record)


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
        content = file.read(size)
        if len(content) < size:
            print(f"warning: {path}: some of its last lines are lost", file=sys.stderr)
        file.truncate(content.rfind(b"\n") + 1)


def finite(record: dict) -> dict:
    """The record with None, JSON's null, for numbers that are not finite."""
    odd = [k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
    return record | dict.fromkeys(odd)


def summary(model: DeScore) -> str:
    """What trains, with counts, in one line."""
    kinds = {".lora_": "LoRA", "merger": "mergers", ".visual.": "vision tower"}
    counts = Counter()
    for name, parameter in model.trainable().items():
        kind = next((kinds[part] for part in kinds if part in name), "language model")
        kind = "[Reward] and head" if name.startswith(OWN) else kind
        counts[kind] += parameter.numel()
    total = sum(p.numel() for p in model.parameters())
    trains = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
    return f"{trains} parameters train, of {total:,}"


class Skipped:
    """The pairs that training leaves out because a video cannot be read: listed in a file,
    and bounded."""

    def __init__(self, path: Path, pairs: Pairs, limit: float, write: bool = True):
        """limit: the largest share of the file's pairs that may be left out, those with
        missing videos included."""
        self.path, self.write, self.records, self.limit = path, write, [], limit
        missing = [row for row in pairs.left_out if row["reason"] == "missing"]
        self.total = len(pairs) + len(missing)
        self.restore([{"row": row["row"], "videos": [row["detail"]], "error": "missing"}
                      for row in missing])

    def restore(self, records: list[dict]) -> None:
        """List these and no others, as a checkpoint has them."""
        self.records = []
        if self.write:
            cut(self.path, 0)
        self.add(records)

    def add(self, bad: list[dict]) -> None:
        """List some more. Raises DataError past the limit."""
        if self.write:
            append(self.path, bad)
        self.records += bad
        if len(self.records) > self.limit * self.total:
            raise DataError(
                f"{len(self.records)} of {self.total} pairs have videos that cannot be read, "
                f"more than --max-skipped {self.limit:g} allows; they are listed in "
                f"{self.path}. The last: {self.records[-1]['error']}")


def read_tests(paths: list[str], label: str | None, root: str | None,
               dimensions: dict[str, int]) -> dict[str, Pairs]:
    """Test sets by the names of their files, under which their figures will stand."""
    tests = Counter(Path(path).stem for path in paths)
    if len(tests) < len(paths):
        raise DataError(f"--test {' '.join(paths)}: two files have the same name, and figures "
                        "go by it")
    return {Path(path).stem: read_pairs(path, label, root, dimensions) for path in paths}
