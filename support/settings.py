"""A stage's settings: a dataclass whose fields are the flags of its command line."""

import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from data import DataError, error_context
from support.batches import THINK_TOKENS
from support.command import READER, Count, Positive, Share, Temperature, Whole
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

    embedded = False  # no flag: whether the embedded default's settings were taken

    model: str | None = setting(None, "a saved model, a run's folder or a Qwen3-VL, directory or "
                                "hub id [the embedded default's]", aliases=["--backbone"])
    train: str | None = setting(None, "pair file to train on [the embedded default]")
    test: list[str] = setting([], "pair files to evaluate on")
    label: str | None = setting(None, "column of the preference [TA, else Overall]")
    root: str | None = setting(None, "folder of their relative paths [each file's own]")
    max_skipped: Share = setting(0.01, "share of the pairs that may be unreadable")
    out: str = setting("runs/run", "the run's folder: metrics, checkpoints, model")
    preset: str | None = setting(None, "JSON file of settings, which flags override; none: as without")
    instruction: str | None = setting(None, "file of another, with <video> and <prompt> in it "
                                      "[the model's own]")
    seed: Whole = setting(0, "of the data's order and of everything drawn at random")
    fps: Positive = setting(2.0, "frames sampled a second")
    min_pixels: Count = setting(128 * 32 * 32, "pixels a frame, at least")
    gradient_checkpointing: bool = setting(True, "less memory, one more forward")
    quant: Literal["4bit"] | None = setting(None, "frozen linear layers in NF4")
    optim: Literal["adamw", "adamw8bit"] = setting("adamw", "8 bits: small moments")
    shard: Literal["full"] | None = setting(None, "split all that trains over ranks (FSDP2)")
    save_every: Whole = setting(50, "steps between checkpoints; 0: at the end only")
    keep: Count = setting(2, "checkpoints kept")
    resume: Literal["true", "false", "insist"] = setting(
        "true", "go on from the newest checkpoint in --out; insist: though code or data have changed")
    workers: Whole = setting(2, "processes that decode videos ahead")
    reader: Literal["av", "decord"] = setting("av", READER["help"])
    think_tokens: Count = setting(THINK_TOKENS, "tokens thought at a time, of prompts and their "
                                "longest CoTs; one pair at least", aliases=["--eval-tokens"])
    max_new_tokens: Count = setting(4096, "longest CoT")
    eval_before: bool = setting(True, "evaluate before the first step")
    eval_every: Whole = setting(0, "evaluate every so many steps too [never]")
    keep_best: str | None = setting(None, "a figure of the evaluations, such as test/accuracy: the model "
                                    "that is best by it is kept too, in best/ [the last alone]")
    eval_temperature: Temperature = setting(1.0, "of its CoTs; 1 is the policy itself")
    keep_rollouts: Whole = setting(4, "videos whose thoughts are written down: of each step of "
                                   "stage 2, and of each test set at each evaluation")
    log: Literal["tensorboard", "wandb"] | None = setting(None, "send the figures there too")

    def __post_init__(self):
        if self.instruction == "problem":
            raise ValueError("training asks all pairs with one instruction, a file's")
        tests = [Path(path).stem for path in self.test]
        if self.keep_best and not (self.eval_every and self.keep_best.partition("/")[0] in tests):
            raise ValueError(f"--keep-best {self.keep_best} needs --eval-every, and to name a figure of "
                             f"a test set: {' or '.join(f'{test}/accuracy' for test in tests)}")

    @property
    def video(self) -> dict:
        """The `VideoSettings` that the command line decides."""
        return {"fps": self.fps, "min_pixels": self.min_pixels, "max_pixels": self.max_pixels}


# Settings that may differ from one start of a run to the next: they do not change what is
# trained.
FREE = {"out", "preset", "resume", "save_every", "keep", "workers", "reader", "max_skipped",
        "keep_rollouts", "log", "test", "eval_before", "eval_every", "eval_temperature",
        "keep_best"}
STAGES = {"coldstart", "rl"}
FREE_IN = {"coldstart": {"think_tokens", "max_new_tokens"}}  # which thinks in evaluation alone


class SettingsParser(HfArgumentParser):
    """Reads "none" for a setting that may be None, so that a preset's can be taken back."""

    def add_argument(self, *names, **how):
        if "type" in how and how.get("default", "") is None:
            how["type"] = optional(how["type"])
            if "choices" in how:
                how["choices"] = [*how["choices"], None]
                how["metavar"] = "{" + ",".join(map(str, how["choices"][:-1])) + ",none}"
        return super().add_argument(*names, **how)


class PresetParser(SettingsParser):
    """Reads the settings of a file, which is to blame for what is wrong with them."""

    def error(self, message: str):
        raise ValueError(message)


def optional(kind: Callable) -> Callable:
    """The type of a flag that may be "none" as well."""

    def read(text: str):
        return None if text == "none" else kind(text)

    read.__name__ = getattr(kind, "__name__", "value")
    return read


def parse_args(Args: type, stage: str):
    """Read the command line into a stage's Args, over a --preset. With no --train, what neither
    gives comes from the embedded default's settings, toy/{stage}.json. Raises DataError for a bad
    preset, and for settings that do not go together; argparse ends the command for a flag that it
    cannot read."""
    flags = sys.argv[1:]
    args = read_flags(Args, flags)
    if args.preset:
        flags = preset_flags(Path(args.preset), Args, stage) + flags
        args = read_flags(Args, flags)
    embedded = args.train is None
    if embedded:
        args = read_flags(Args, preset_flags(ROOT / f"toy/{stage}.json", Args, stage) + flags)
        if args.model.startswith("toy/"):
            args.model = str(ROOT / args.model)
    with error_context("settings that do not go together", ValueError):
        args = Args(**vars(args))
    if args.model is None:
        raise DataError("--train needs --model: a Qwen3-VL, directory or hub id")
    args.embedded = embedded
    return args


def read_flags(Args: type, flags: list[str]):
    """The values of a stage's flags. "none" in a list takes back what stands before it."""
    args = SettingsParser(Args).parse_args(flags)
    for name, value in vars(args).items():
        if isinstance(value, list) and "none" in value:
            last = len(value) - value[::-1].index("none")
            setattr(args, name, value[last:])
    return args


def preset_flags(path: Path, Args: type, stage: str, above: tuple[Path, ...] = ()) -> list[str]:
    """The settings of a JSON file as a command line: of one for both stages, {"coldstart": {…},
    "rl": {…}}, the stage's. "preset" names a file whose settings they override. Raises DataError,
    naming the file and the key, for what is no setting or has no such value."""
    path = path if path.is_file() else ROOT / path
    if path.resolve() in above:
        raise DataError(f"{path}: a preset that builds on itself")
    above += (path.resolve(),)
    record = read_json(path)
    flags = []
    if not STAGES.isdisjoint(record):
        for key, settings in record.items():
            if key not in STAGES or not isinstance(settings, dict):
                raise DataError(f"{path}: {key!r} is no stage with its settings")
        record = record.get(stage, {})
    known = {field.name: field for field in fields(Args)}
    parser = PresetParser(Args)
    for key, value in record.items():
        name = key.replace("-", "_")
        if name not in known:
            raise DataError(f"{path}: there is no setting {key!r}")
        if name == "preset":
            if value is None:
                continue
            base = path.parent / str(value)
            if not base.is_file():
                raise DataError(f"{path}: {key!r} is {value!r}: no such file")
            flags = preset_flags(base, Args, stage, above) + flags
            continue
        values = value if isinstance(value, list) else ["none" if value is None else value]
        with error_context(f"{path}: {key!r} is {value!r}"[:300], ValueError):
            if not all(isinstance(one, (str, int, float)) for one in values):
                raise ValueError("neither a text nor a number")
            setting_flags = [f"--{name}", *map(as_word, values)] if values else []
            parser.parse_args(setting_flags)
        flags += setting_flags
    return flags


def as_word(value: str | float) -> str:
    """A value of a JSON file as the command line has it."""
    return json.dumps(value) if isinstance(value, bool) else str(value)


def function_file(file: str) -> Path:
    """The file that FILE in FILE:FUNCTION=WEIGHT stands for: one that is there, else the project's own."""
    return Path(file) if Path(file).is_file() else ROOT / file


def load_function(asked: str, **offered) -> tuple[str, str, float | None, Callable]:
    """A function of the user's own, asked for as FILE:FUNCTION=WEIGHT, or without a weight: where it
    stands (FILE:FUNCTION), its name, weight and itself, which gets those of the `offered` keyword
    arguments that it names. Raises DataError, saying what was asked for, where there is none or
    its file fails."""
    where, has_weight, weight = asked.rpartition("=") if "=" in asked else (asked, "", None)
    with error_context(f"{asked}: not FILE:FUNCTION=WEIGHT", ValueError):
        file, name = where.rsplit(":", 1)
        if has_weight and not math.isfinite(weight := float(weight)):
            raise ValueError("a weight is a finite number")
    function = import_function(where, asked)
    with error_context(f"{asked}: {file} cannot be imported", Exception):
        named = list(inspect.signature(function).parameters)[3:]  # behind text, n_tokens, gold
    wanted = {key: value for key, value in offered.items() if key in named}

    def explaining(*arguments) -> float:
        with error_context(f"{asked}: {name} fails", Exception, SystemExit):
            return float(function(*arguments, **wanted))

    return where, name, weight, explaining


def import_function(where: str, asked: str) -> Callable:
    """The function that stands at FILE:FUNCTION. Raises DataError, saying what was asked for, where
    there is none or its file fails."""
    with error_context(f"{asked}: not FILE:FUNCTION", ValueError):
        file, name = where.rsplit(":", 1)
    path = function_file(file)
    if not path.is_file() or path.suffix != ".py":
        raise DataError(f"{asked}: {file} is no Python file")
    # Whatever a file of the user's own may do while it runs.
    with error_context(f"{asked}: {file} cannot be imported", Exception, SystemExit):
        spec = importlib.util.spec_from_file_location(f"function {path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where a dataclass looks while it is made
        try:
            spec.loader.exec_module(module)
        finally:
            del sys.modules[spec.name]
    function = getattr(module, name, None)
    if not callable(function):
        raise DataError(f"{asked}: {file} has no function {name!r}")
    return function
