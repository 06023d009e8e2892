"""A stage's settings: a dataclass whose fields are the flags of its command line."""

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from data import DataError, explained
from support.batches import THINK_TOKENS
from support.command import Count, NotNegative, Positive, Share, Whole
from support.files import read_json

ROOT = Path(__file__).resolve().parent.parent


def setting(default, help: str, **more):
    """A field of a stage's settings, which is a flag of its command line. Its type states the
    range of a number (support/command.py)."""
    if isinstance(default, list):
        return HfArg(default_factory=default.copy, help=help, **more)
    return HfArg(default=default, help=help, **more)


@dataclass
class RunArgs:
    """What both stages are told; each adds the method's own settings."""

    model: str | None = setting(None, "a saved model, a run's folder or a Qwen3-VL, directory or "
                                "hub id [the embedded default's]", aliases=["--backbone"])
    train: str | None = setting(None, "pair file to train on [the embedded default]")
    test: list[str] = setting([], "pair files to evaluate on")
    label: str | None = setting(None, "column of the preference [TA, else Overall]")
    root: str | None = setting(None, "folder of their relative paths [each file's own]")
    max_skipped: Share = setting(0.01, "share of the pairs that may be unreadable")
    out: str = setting("runs/run", "the run's folder: metrics, checkpoints, model")
    preset: str | None = setting(None, "JSON file of settings; flags override it")
    seed: Whole = setting(0, "of the data's order and of everything drawn at random")
    fps: Positive = setting(2.0, "frames sampled a second")
    min_pixels: Count = setting(128 * 32 * 32, "pixels a frame, at least")
    gradient_checkpointing: bool = setting(True, "less memory, one more forward")
    quant: Literal["4bit"] | None = setting(None, "frozen linear layers in NF4")
    optim: Literal["adamw", "adamw8bit"] = setting("adamw", "8 bits: small moments")
    shard: Literal["full"] | None = setting(None, "split all that trains over ranks (FSDP2)")
    save_every: Whole = setting(50, "steps between checkpoints; 0: at the end only")
    keep: Count = setting(2, "checkpoints kept")
    resume: bool = setting(True, "go on from the newest checkpoint in --out")
    workers: Whole = setting(2, "processes that decode videos ahead")
    think_tokens: Count = setting(THINK_TOKENS, "tokens thought at a time, of prompts and their "
                                "longest CoTs; one pair at least", aliases=["--eval-tokens"])
    max_new_tokens: Count = setting(4096, "longest CoT")
    eval_before: bool = setting(True, "evaluate before the first step")
    eval_every: Whole = setting(0, "evaluate every so many steps too [never]")
    eval_temperature: NotNegative = setting(1.0, "of its CoTs; 1 is the policy itself")
    keep_rollouts: Whole = setting(4, "videos whose thoughts are written down: of each step of "
                                   "stage 2, and of each test set at each evaluation")
    log: Literal["tensorboard", "wandb"] | None = setting(None, "send the figures there too")

    @property
    def video(self) -> dict:
        """The `VideoSettings` that the command line decides."""
        return {"fps": self.fps, "min_pixels": self.min_pixels, "max_pixels": self.max_pixels}


# Settings that may differ from one start of a run to the next: they do not change what is
# trained.
FREE = {"out", "preset", "resume", "save_every", "keep", "workers", "max_skipped",
        "keep_rollouts", "log", "test", "eval_before", "eval_every", "eval_temperature"}
FREE_IN = {"coldstart": {"think_tokens", "max_new_tokens"}}  # which thinks in evaluation alone


class PresetParser(HfArgumentParser):
    """Reads the settings of a file, which is to blame for what is wrong with them."""

    def error(self, message: str):
        raise ValueError(message)


def parse_args(Args: type, toy: Path):
    """Read the command line into a stage's Args, over a --preset. With no --train, what
    neither gives comes from the embedded default's settings, `toy`. Returns the Args, and
    whether they are the embedded default's. Raises DataError for a bad preset, and for settings
    that do not go together; argparse ends the command for a flag that it cannot read."""
    parser = HfArgumentParser(Args)
    given = sys.argv[1:]
    args = parser.parse_args(given)
    if args.preset:
        given = preset_flags(Path(args.preset), Args) + given
        args = parser.parse_args(given)
    embedded = args.train is None
    if embedded:
        args = parser.parse_args(preset_flags(toy, Args) + given)
        if args.model.startswith("toy/"):
            args.model = str(ROOT / args.model)
    with explained("settings that do not go together", ValueError):
        return Args(**vars(args)), embedded


def preset_flags(path: Path, Args: type) -> list[str]:
    """The settings of a JSON file as a command line. Raises DataError, naming the file and the
    key, for what is no setting or has no such value."""
    parser, flags = PresetParser(Args), []
    known = {field.name for field in fields(Args)} - {"preset"}
    for key, value in read_json(path).items():
        name = key.replace("-", "_")
        if name not in known:
            raise DataError(f"{path}: there is no setting {key!r}")
        values = value if isinstance(value, list) else [] if value is None else [value]
        with explained(f"{path}: {key!r} is {value!r}"[:300], ValueError):
            if not all(isinstance(one, (str, int, float)) for one in values):
                raise ValueError("neither a text nor a number")
            some = [f"--{name}", *map(str, values)] if values else []
            parser.parse_args(some)
        flags += some
    return flags


def load_function(given: str) -> tuple[str, float, Callable]:
    """A function of the user's own, given as FILE:FUNCTION=WEIGHT: its name, weight and itself.
    Raises DataError, saying what was given, where there is none or its file fails."""
    with explained(f"{given}: not FILE:FUNCTION=WEIGHT", ValueError):
        where, weight = given.rsplit("=", 1)
        file, name = where.rsplit(":", 1)
        if not math.isfinite(weight := float(weight)):
            raise ValueError("a weight is a finite number")
    path = Path(file) if Path(file).is_file() else ROOT / file
    if not path.is_file() or path.suffix != ".py":
        raise DataError(f"{given}: {file} is no Python file")
    # Whatever a file of the user's own may do while it runs.
    with explained(f"{given}: {file} cannot be imported", Exception, SystemExit):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise DataError(f"{given}: {file} has no function {name!r}")

    def explaining(*arguments) -> float:
        with explained(f"{given}: {name} fails", Exception, SystemExit):
            return float(function(*arguments))

    return name, weight, explaining
