"""How our commands run. peft comes from here, for its import has remarks to make."""

import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

from data import DataError


@contextmanager
def quiet(name: str):
    """Within it the logger of that name says nothing; afterwards it is as it was."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


with quiet("bitsandbytes"):  # which peft imports, and which misses kernels not used here
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.utils import get_peft_model_state_dict

__all__ = ["LoraConfig", "PeftModel", "get_peft_model", "get_peft_model_state_dict", "run_command"]


def run_command(main: Callable[[], None]) -> None:
    """Run a command's main: its output is what we print, and bad input ends it in one line."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    message = ".*is_gradient_checkpointing"  # peft uses what transformers deprecates
    warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    try:
        main()
    except (DataError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
