"""A stage's settings: a dataclass whose fields are the flags of its command line."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from data import DataError, explained
from support.batches import THINK_TOKENS
from support.files import read_json

ROOT = Path(__file__).resolve().parent.parent


def setting(default, help: str, **more):
    """A field of a stage's settings, which is a flag of its command line."""
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
    max_skipped: float = setting(0.01, "share of the pairs that may be unreadable")
    out: str = setting("runs/run", "the run's folder: metrics, checkpoints, model")
    preset: str | None = setting(None, "JSON file of settings; flags override it")
    seed: int = setting(0, "of the data's order and of everything drawn at random")
    fps: float = setting(2.0, "frames sampled a second")
    min_pixels: int = setting(128 * 32 * 32, "pixels a frame, at least")
    gradient_checkpointing: bool = setting(True, "less memory, one more forward")
    quant: Literal["4bit"] | None = setting(None, "frozen linear layers in NF4")
    optim: Literal["adamw", "adamw8bit"] = setting("adamw", "8 bits: small moments")
    shard: Literal["full"] | None = setting(None, "split all that trains over ranks (FSDP2)")
    save_every: int = setting(50, "steps between checkpoints; 0: at the end only")
    keep: int = setting(2, "checkpoints kept")
    resume: bool = setting(True, "go on from the newest checkpoint in --out")
    workers: int = setting(2, "processes that decode videos ahead")
    think_tokens: int = setting(THINK_TOKENS, "tokens thought at a time, of prompts and their "
                                "longest CoTs; one pair at least", aliases=["--eval-tokens"])
    max_new_tokens: int = setting(4096, "longest CoT")
    eval_before: bool = setting(True, "evaluate before the first step")
    eval_every: int = setting(0, "evaluate every so many steps too [never]")
    eval_temperature: float = setting(1.0, "of its CoTs; 1 is the policy itself")

    @property
    def video(self) -> dict:
        """The `VideoSettings` that the command line decides."""
        return {"fps": self.fps, "min_pixels": self.min_pixels, "max_pixels": self.max_pixels}


# Settings that may differ from one start of a run to the next: they do not change what is
# trained. (think_tokens would in stage 2: what goes together is rounded together.)
FREE = {"out", "preset", "resume", "save_every", "keep", "workers", "max_skipped",
        "keep_rollouts", "test", "eval_before", "eval_every", "eval_temperature"}


def parse_args(Args: type, toy: Path):
    """Read the command line into a stage's Args, over a --preset. With no --train, what
    neither gives comes from the embedded default's settings, `toy`. Returns the Args, and
    whether they are the embedded default's."""
    parser = HfArgumentParser(Args)
    given = sys.argv[1:]
    args = parser.parse_args(given)
    if args.preset:
        given = preset_flags(Path(args.preset), parser) + given
        args = parser.parse_args(given)
    embedded = args.train is None
    if embedded:
        args = parser.parse_args(preset_flags(toy, parser) + given)
        if args.model.startswith("toy/"):
            args.model = str(ROOT / args.model)
    return Args(**vars(args)), embedded


def preset_flags(path: Path, parser: HfArgumentParser) -> list[str]:
    """The settings of a JSON file as a command line."""
    settings, flags = read_json(path), []
    known = [name for action in parser._actions for name in action.option_strings]
    for key, value in settings.items():
        flag = "--" + key.replace("_", "-")
        if flag not in known:
            raise DataError(f"{path}: there is no setting {key!r}")
        if value is not None and value != []:
            values = value if isinstance(value, list) else [value]
            flags += [flag, *map(str, values)]
    return flags


def load_function(given: str) -> tuple[str, float, Callable]:
    """A function of the user's own, given as FILE:FUNCTION=WEIGHT: its name, weight and itself."""
    kinds = (ValueError, OSError, SyntaxError, AttributeError, ImportError)
    with explained(f"{given}: not FILE:FUNCTION=WEIGHT", *kinds):
        where, weight = given.rsplit("=", 1)
        file, name = where.rsplit(":", 1)
        path = Path(file) if Path(file).is_file() else ROOT / file
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return name, float(weight), getattr(module, name)
