"""A run's figures sent to TensorBoard or Weights & Biases as well (`--log`), whose packages are not
needed otherwise. metrics.jsonl stays what holds: a tracker that fails never stops a run."""

import importlib
import json
import math
import os
import sys
import uuid
from pathlib import Path

from data import DataError, error_context, is_number
from support.files import delete, read_json, write_whole

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def load(kind: str):
    """The module of a tracker. Raises DataError where its package is not installed."""
    try:
        return importlib.import_module(PACKAGES[kind])
    except ImportError as error:
        raise DataError(f"--log {kind}: needs the package, which cannot be imported ({error}); "
                        f"pip install {kind}, or leave out --log") from error


class Tracker:
    """What figures are sent to. This one sends them nowhere; each kind has its own `open`, `put` and
    `close`."""

    def __init__(self, kind: str | None, folder: Path, settings: dict):
        """settings: the run's, which are shown beside its figures."""
        self.kind, self.folder, self.settings = kind, folder, settings
        self.module, self.works = load(kind) if kind else None, kind is not None

    def begin(self, records: list[dict], anew: bool) -> None:
        """Take up a run: `records` is its log so far, in which steps that a kill has cost and that
        are done again are no longer; `anew` where there is nothing to go on from."""
        self.attempt(self.open, anew)
        for record in records:
            self.send(record)

    def send(self, record: dict) -> None:
        """A record of metrics.jsonl: its numbers, at its step."""
        figures = {}
        for name, value in record.items():
            if name != "step" and is_number(value) and math.isfinite(value):
                figures[name] = value
        self.attempt(self.put, record.get("step"), figures)

    def open(self, anew: bool) -> None:
        pass

    def put(self, step: int, figures: dict[str, float]) -> None:
        pass

    def close(self) -> None:
        pass

    def end(self) -> None:
        self.attempt(self.close)

    def attempt(self, action, *arguments) -> None:
        """Do it, unless it has failed before; where it fails, say so and go on without."""
        if not self.works:
            return
        try:
            # Whatever may go wrong in a package, or between here and a server.
            with error_context(f"--log {self.kind} fails", Exception):
                action(*arguments)
        except DataError as error:
            self.works = False
            print(f"warning: {error}; nothing more is sent, metrics.jsonl has all figures",
                  file=sys.stderr)


class TensorBoard(Tracker):
    """Event files in the run's folder. They are written anew from the log at each start, so that
    no step stands there twice, and a run may be sent there late."""

    def open(self, anew: bool) -> None:
        delete(self.folder / "tensorboard")
        self.writer = self.module.SummaryWriter(str(self.folder / "tensorboard"))
        self.writer.add_text("settings", f"```\n{json.dumps(self.settings, indent=1)}\n```", 0)

    def put(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB(Tracker):
    """A run at Weights & Biases, under one id however often it is started. What is sent cannot be
    taken back, so that wandb.json in the run's folder keeps how far the figures of steps and those
    of evaluations have come; what is done again is not sent again."""

    def open(self, anew: bool) -> None:
        self.path = self.folder / "wandb.json"
        if anew:
            delete(self.path)
        self.state = {"id": uuid.uuid4().hex[:12], "step": -1, "evaluation": -1}
        if self.path.is_file():
            with error_context(f"{self.path}: not as it was written", KeyError):
                found = read_json(self.path)
                self.state = {name: found[name] for name in self.state}
        self.run = self.module.init(
            project=os.environ.get("WANDB_PROJECT", "descore"), name=self.folder.name,
            id=self.state["id"], resume="allow", dir=str(self.folder), config=self.settings)
        # Our own step, which goes back and may be sent twice, as that of a step and an evaluation.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def put(self, step: int, figures: dict[str, float]) -> None:
        kind = "evaluation" if any("/" in name for name in figures) else "step"
        if step > self.state[kind]:
            self.run.log({"step": step, **figures})
            self.state[kind] = step
            write_whole(self.path, json.dumps(self.state) + "\n")

    def close(self) -> None:
        self.run.finish()


KINDS = {"tensorboard": TensorBoard, "wandb": WandB, None: Tracker}


def tracker(kind: str | None, folder: Path, settings: dict) -> Tracker:
    """A tracker by its name. Raises DataError where its package is not installed."""
    return KINDS[kind](kind, folder, settings)
