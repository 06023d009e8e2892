"""Many questions under way at a time: answers come as soon as they are there, so that all can be kept."""

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from data import DataError
from tools.endpoint import Stopped

GRACE = 3.0  # seconds in which what is under way may still be answered after Ctrl-C
FEW = 5  # questions that may always stay without an answer; as many failures in a row end all


def ask_all(ask: Callable[..., dict], keys: list[tuple], parallel: int, stop: threading.Event,
            bound: "Bound", timeout: float) -> Iterator[dict]:
    """What `ask` makes of each key, `parallel` at a time, in the order in which it is done.

    Ctrl-C, a DataError of `ask` and what goes past the bound end it: `stop` is set, on which `ask` may
    raise Stopped, and what is answered within `GRACE`, or without Ctrl-C the time-out, comes before the
    exception is raised."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for key in keys:
        waiting.put(key)
    # Records; an exception that ends all; None of each thread that has ended.
    found: queue.SimpleQueue = queue.SimpleQueue()
    room = threading.Semaphore(parallel)  # nobody asks on before an answer is kept and counted
    stop.clear()
    for _ in range(parallel):
        # What it still waits for does not keep the process.
        threading.Thread(target=work, args=(ask, waiting, found, room), daemon=True).start()
    at_work = parallel
    end: BaseException | None = None
    until: float | None = None
    try:
        with interrupts_to(found):
            while at_work:
                one = found.get(timeout=None if until is None else max(until - time.monotonic(), 0.0))
                if one is None:
                    at_work -= 1
                    room.release()
                    continue
                if isinstance(one, dict):
                    yield one
                    one = bound.past(one)
                    if one is None:
                        room.release()
                if one is not None:
                    stop.set()
                    end = end or one
                    last = time.monotonic() + (GRACE if isinstance(one, KeyboardInterrupt) else timeout)
                    until = last if until is None else min(until, last)
                    room.release(parallel)  # who waits for it is to see that it is over
    except queue.Empty:  # who has not answered by then is not waited for
        pass
    finally:
        stop.set()
        room.release(parallel)
    if end is not None:
        raise end


def work(ask: Callable[..., dict], waiting: queue.SimpleQueue, found: queue.SimpleQueue,
         room: threading.Semaphore) -> None:
    """Ask about keys until none waits, or nobody does."""
    try:
        while True:
            room.acquire()
            found.put(ask(*waiting.get_nowait()))
    except (queue.Empty, Stopped):
        pass
    except BaseException as error:  # noqa: BLE001 (it is raised where answers are awaited)
        found.put(error)
    found.put(None)


class Bound:
    """How many questions of an endpoint may stay without an answer."""

    def __init__(self, name: str, total: int, share: float):
        """share: of `total`, but a `FEW` always may."""
        self.name, self.total, self.share = name, total, share
        self.skipped = self.row = 0

    def past(self, record: dict) -> DataError | None:
        """What there is to be said after one more record, if that is one too many."""
        self.row = self.row + 1 if record.get("failed") else 0
        if "refused" not in record:
            return None
        self.skipped += 1
        if self.row >= FEW:
            return DataError(f"{self.name}: {self.row} failures in a row; the last: {record['error']}")
        if self.skipped > max(FEW, self.share * self.total):
            return DataError(
                f"{self.name}: {self.skipped} of {self.total} questions have no answer, more than "
                f"--max-skipped {self.share:g} allows; the last: {record['error']}")
        return None


@contextmanager
def interrupts_to(found: queue.SimpleQueue) -> Iterator[None]:
    """Within it, the first Ctrl-C becomes a KeyboardInterrupt in a queue, so that nothing that is under
    way is torn; the second is as ever."""

    def note(number, frame) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        found.put(KeyboardInterrupt())

    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
