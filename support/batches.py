"""What goes through the model together, and on which rank: rows of like length within a budget of
tokens, decoded ahead."""

import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from multiprocessing.reduction import ForkingPickler
from traceback import clear_frames
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import Batch, DataError, Key, Processor
from support.ranks import ALONE, Ranks

HALF_MADE: list[Exception] = []  # and the loaders that hang on them, which complain when they go
THINK_TOKENS = 65_536  # thought at a time, unless told otherwise: at 8B a cache of 10 GB


def prompt_lengths(processor: Processor, keys: list[Key], ranks: Ranks = ALONE) -> dict[Key, int]:
    """How many tokens the prompt of each key has, by one frame of each video; several ranks share
    the work. 0 where a video cannot be read: reading it will say why."""

    def length(key: Key) -> int:
        try:
            return len(processor.outline(*key).input_ids)
        except DataError:
            return 0

    keys = ranks.share(list(dict.fromkeys(keys)))
    with ThreadPoolExecutor() as pool:
        lengths = pool.map(length, keys)
        lengths = tqdm(lengths, "lengths", len(keys), unit="video", disable=len(keys) < 2000)
        return dict(ranks.gather(list(zip(keys, lengths))))


def read_ahead(processor: Processor, groups: list[list[list[Key]]], workers: int = 0,
               limit: int | None = None,
               order: Iterable[int] | None = None) -> Iterator[tuple[Batch, list[str | None]]]:
    """One Batch for each group, in order, or for those whose numbers `order` gives. With workers,
    other processes decode ahead.

    A group is a list of units, and a unit a list of keys that stand or fall together, such as the
    `videos()` of an item. Yields the batch, and for each unit None or what is wrong with it: a
    video that cannot be read, or a prompt of more than `limit` tokens. In the batch black frames
    then stand in for the unit's videos, so that its rows are there."""
    return done_ahead(partial(read_group, processor, limit), groups, workers, order)


def done_ahead(work: Callable, items: list, workers: int,
               order: Iterable[int] | None = None) -> Iterator:
    """What `work` makes of each item, in order, or of those whose numbers `order` gives. With workers,
    other processes do it ahead, two items each; raises DataError where they fail."""
    order = range(len(items)) if order is None else order
    if not workers:
        for number in order:
            yield work(items[number])
        return
    loader = None
    try:
        # It draws a seed that nobody uses, and should not draw it from the caller's random numbers.
        loader = iter(DataLoader(
            items, batch_size=None, sampler=order, num_workers=workers, generator=torch.Generator(),
            collate_fn=partial(pickled, work), worker_init_fn=leave_signals))
        yield from map(pickle.loads, loader)
    except Exception as error:
        if loader is None:
            HALF_MADE.append(error)
        else:  # the other workers end with it, and not at exit, when torch would speak of them
            clear_frames(error.__traceback__)
            del loader
        raise worker_error(error) from error


def pickled(work: Callable, item) -> bytes:
    """What `work` makes of an item, its tensors in shared memory. Pickled by the worker itself: the
    loader's thread would drop what fails, and it would be waited for."""
    return bytes(ForkingPickler.dumps(work(item)))


def worker_error(error: Exception) -> DataError:
    """What is said of a worker that fails: the last line of torch's, and what it may have lacked."""
    *_, reason = str(error).strip().splitlines() or [type(error).__name__]
    if os.path.isdir("/dev/shm"):
        size = shutil.disk_usage("/dev/shm").total / 1e6
        reason += f"; they hand videos over in /dev/shm, which holds {size:,.0f} MB"
    return DataError(f"the processes that decode videos ahead fail ({reason}); --workers 0 needs none")


def read_group(processor: Processor, limit: int | None,
               group: list[list[Key]]) -> tuple[Batch, list[str | None]]:
    """What `read_ahead` yields for a group."""
    samples = []
    errors = []
    for unit in group:
        try:
            of_unit = [processor(*key) for key in unit]
            for sample, (video, _) in zip(of_unit, unit):
                length = len(sample.input_ids)
                if limit and length > limit:
                    raise DataError(f"{video}: a prompt of {length} tokens, more than {limit}")
            errors.append(None)
        except DataError as error:
            # The smallest video there is: as many frames and pixels as one token stands for.
            side = processor.settings.patch_size * processor.settings.merge_size
            frames = processor.settings.temporal_patch_size
            black = torch.zeros(frames, 3, side, side, dtype=torch.uint8)
            sample = processor.sample(black, [0.0] * frames, "")
            of_unit = [replace(sample, source=key) for key in unit]
            errors.append(str(error))
        samples += of_unit
    return processor.collate(samples), errors


def split_unreadable(group: list[tuple[int, Key]],
                     errors: list[str | None]) -> tuple[list[int], list[dict]]:
    """Of a group of numbered keys the rows that `read_ahead` could read, and for each of the others
    a record: video, prompt, error."""
    rows = []
    unread = []
    for row, ((_, (video, prompt)), error) in enumerate(zip(group, errors)):
        if error:
            unread.append({"video": video, "prompt": prompt, "error": error})
        else:
            rows.append(row)
    return rows, unread


def leave_signals(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the one that trains decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def chunks(items: list, size: int) -> list[list]:
    """A list cut into lists of the given size, the last one shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def split_evenly(items: list, count: int) -> list[list]:
    """A list cut into `count` lists as even as can be, in order; where it has fewer items, into
    one list for each."""
    count = min(count, len(items))
    cuts = [len(items) * i // count for i in range(count + 1)]
    return [items[start:end] for start, end in pairwise(cuts)]


def pack_by_budget(items: list, sizes: list[int], budget: int) -> list[list]:
    """Items of like size together: lists in which the largest size times the number of items, the
    tokens that they take with their padding, is within the budget. The largest come first, so that
    what does not fit in memory shows at once; an item above the budget stands alone."""
    lists = []
    widest = 0  # size in the last list
    for row in sorted(range(len(items)), key=lambda row: -sizes[row]):
        if not lists or widest * (len(lists[-1]) + 1) > budget:
            lists.append([])
            widest = sizes[row]
        lists[-1].append(items[row])
    return lists


def group_by_length(lengths: list[int], waste: float = 0.1) -> list[list[int]]:
    """Row numbers in lists of like length, the longest first: side by side, at most a share
    `waste` of each list is padding."""
    lists = []
    used = 0  # tokens in the last list
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if lists:
            longest = lengths[lists[-1][0]]
            area = (len(lists[-1]) + 1) * longest
        if not lists or used + lengths[row] < (1 - waste) * area:
            lists.append([])
            used = 0
        lists[-1].append(row)
        used += lengths[row]
    return lists


def draw_seed(*path: int) -> int:
    """A seed that is a pure function of numbers such as (seed, step, place)."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0] >> 1)


def deal(items: list, sizes: list[int], budget: int, ranks: Ranks) -> list[list[tuple]]:
    """This rank's micro-batches of (item, weight), each within a budget (`pack_by_budget`).

    Items of like size go side by side to the ranks, so that every rank has as many
    micro-batches and all of one turn are of like size: ranks of a sharded model run in step.
    Where the last of a turn are missing, a rank repeats another's item with weight 0."""
    largest_first = sorted(range(len(items)), key=lambda row: -sizes[row])
    turns = chunks(largest_first, ranks.world)  # of each one row for each rank
    widest = [sizes[turn[0]] for turn in turns]
    micro_batches = []
    for turns_together in pack_by_budget(turns, widest, budget):
        mine = []
        for turn in turns_together:
            if ranks.rank < len(turn):
                mine.append((items[turn[ranks.rank]], 1.0))
            else:
                mine.append((items[turn[0]], 0.0))
        micro_batches.append(mine)
    return micro_batches


def deal_to_all(items: list, sizes: list[int], budget: int, world: int) -> list[list]:
    """What each of so many ranks is dealt (`deal`), turn by turn and the largest first, nothing twice."""
    dealt = [deal(items, sizes, budget, Ranks(rank, world)) for rank in range(world)]
    groups = [[item for item, weight in group if weight] for turn in zip(*dealt) for group in turn]
    return [group for group in groups if group]


class Planned(NamedTuple):
    """An item, such as a pair, in a step's plan."""

    item: Any
    place: int  # in the step's batch; what is random about it depends on (seed, step, place)
    weight: float  # 1.0, or 0.0 where it only keeps this rank in step with the others


def plan_step(items: list, sizes: list[int], budget: int, ranks: Ranks = ALONE,
              updates: int = 1) -> list[list[list[Planned]]]:
    """What this rank does in a step: for each optimiser update its micro-batches, each a list of
    items that go through the model together.

    items: the step's batch, over all ranks; sizes: the tokens that each of them takes. The batch
    is split into so many updates, as even as can be and in its order (`split_evenly`); within an
    update items of like size go together, each micro-batch within the budget (`deal`). Pure: what
    a step does can be planned before the run begins, and each rank plans its own part alone."""
    plan = []
    for places in split_evenly(list(range(len(items))), updates):
        micro_batches = []
        for micro in deal(places, [sizes[place] for place in places], budget, ranks):
            micro_batches.append([Planned(items[place], place, weight) for place, weight in micro])
        plan.append(micro_batches)
    return plan
