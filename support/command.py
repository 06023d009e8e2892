"""How our commands run. peft comes from here, for its import has remarks to make."""

import argparse
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable

from transformers.utils import logging as transformers_logging

from data import DataError
from support.batches import worker_error
from support.frames import READERS

remarks = logging.getLogger("bitsandbytes")  # which peft imports; it misses kernels not used here
level = remarks.level
remarks.setLevel(logging.CRITICAL)
try:
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.utils import get_peft_model_state_dict
finally:
    remarks.setLevel(level)

__all__ = ["READER", "LoraConfig", "PeftModel", "add_think_at", "get_peft_model",
           "get_peft_model_state_dict", "number", "run_command"]


def number(kind: type, words: str, fits: Callable[[float], bool]) -> type:
    """The type of a flag that is a number, int or float, within a range: a text becomes a plain
    number, or argparse says that it is not what `words` say. NaN and infinity are in no range."""

    def make(cls, text: str) -> float:
        try:
            value = kind(text)
            if abs(value) < 2**63 and fits(value):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")

    return type(kind.__name__, (kind,), {"__new__": make})


Count = number(int, "a whole number of 1 or more", lambda x: x >= 1)
Whole = number(int, "a whole number of 0 or more", lambda x: x >= 0)
Number = number(float, "a finite number", lambda x: True)
NotNegative = number(float, "a number of 0 or more", lambda x: x >= 0)
Positive = number(float, "a number above 0", lambda x: x > 0)
Factor = number(float, "a number of 1 or more", lambda x: x >= 1)
Share = number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
# Divided by a temperature or a penalty near 0, logits run over; a set of mass near 0 holds no token.
LEAST_TEMPERATURE, LEAST_TOP_P = 0.01, 0.0001
LEAST_PENALTY = 0.01
Heat = number(float, f"a number of {LEAST_TEMPERATURE} or more", lambda x: x >= LEAST_TEMPERATURE)
Temperature = number(float, f"a number of {LEAST_TEMPERATURE} or more, or 0",
                     lambda x: x == 0 or x >= LEAST_TEMPERATURE)
TopP = number(float, f"a number from {LEAST_TOP_P} to 1", lambda x: LEAST_TOP_P <= x <= 1)

# The flag of whatever opens video files.
READER = {"choices": READERS, "default": "av", "help": "decord: it decodes the files of which it shows "
          "the same frames, and does not notice a damaged frame"}


def not_empty(value: str) -> str:
    """The type of a flag that is a text: an empty one, as of a variable that is not set, is none."""
    if not value:
        raise argparse.ArgumentTypeError("it is empty")
    return value


def add_think_at(parser: argparse.ArgumentParser) -> None:
    """Add the flags of an endpoint that thinks (tools/think_at.py) to a command."""
    add = parser.add_argument
    add("--think-at", type=not_empty, metavar="URL",
        help="an OpenAI-compatible endpoint thinks, up to /v1; the model scores")
    add("--think-at-model", type=not_empty, help="the model's name there")
    add("--api-key-env", default="OPENAI_API_KEY", help="variable that holds the key [the usual one, if set]")


class Outlet(io.FileIO):
    """Where a standard stream goes: nowhere once its reader has left, which ends no work, or once it
    could not be written, which is said."""

    def write(self, content) -> int:
        try:
            return super().write(content)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if not isinstance(error, BrokenPipeError):
                raise OSError(error.errno, error.strerror, "the output") from error
        return len(content)


def set_streams() -> None:
    """Let output show by escapes what its encoding lacks. One that is closed gets a place all the same."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # nobody has put another there
            outlet = Outlet(stream.fileno(), "w", closefd=False) if stream else Outlet(os.devnull, "w")
            encoding = stream.encoding if stream else None
            buffer = io.BufferedWriter(outlet)
            setattr(sys, name, io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True))


def run_command(main: Callable[[], None]) -> None:
    """Run a command's main: its output is what we print, and bad input ends it in one line."""
    set_streams()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    message = ".*is_gradient_checkpointing"  # peft uses what transformers deprecates
    warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    try:
        main()
    except (DataError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except RuntimeError as error:  # what torch says of both wherever the command is
        is_worker = "DataLoader worker" in str(error)
        if not is_worker and not re.search("(out of|allocate) memory", str(error)):
            raise
        raise SystemExit(f"error: {worker_error(error) if is_worker else DataError(error)}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
