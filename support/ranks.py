"""The processes that torchrun started, and what they tell each other."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Timer
from uuid import uuid4

import torch
import torch.distributed as dist

from data import DataError, Key, error_context
from support.digests import of_json, of_model
from support.files import digest

# What torchrun tells a process. Some of it may be left over from somebody else's.
TOLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
QUIET = 5.0  # seconds of waiting for the others, before it is said


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started (or alone)."""

    rank: int = 0
    world: int = 1
    store: dist.Store | None = field(default=None, repr=False, compare=False)  # that all of them see

    @staticmethod
    def start() -> "Ranks":
        """The ranks that the environment speaks of. Raises DataError where it says half of it."""
        if "RANK" not in os.environ:
            return Ranks()
        lacking = [name for name in TOLD if name not in os.environ]
        if lacking:
            raise DataError(f"RANK is set, and {', '.join(lacking)} not: start it by torchrun, or "
                            "unset RANK to run it alone")
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "nccl"
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        said = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}, waiting for the others at {place}"
        waiting = Timer(QUIET, print, [said], {"file": sys.stderr, "flush": True})
        waiting.daemon = True
        waiting.start()
        with error_context(f"{said} in vain", ValueError, RuntimeError):
            if not 0 <= int(os.environ["RANK"]) < int(os.environ["WORLD_SIZE"]):
                raise ValueError("there is no such rank")
            store, rank, world = next(dist.rendezvous("env://"))
        # torchrun keeps one store over its restarts. Under a name of each restart's own, no
        # rank finds the address of one that died. (Only hosts that all count alike can agree
        # on such a name.)
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            restart = os.environ["TORCHELASTIC_RESTART_COUNT"]
            store = dist.PrefixStore(f"restart {restart}", store)
        # The others wait while the first writes a checkpoint: NCCL's ten minutes can be too few.
        dist.init_process_group(backend, store=store, rank=rank, world_size=world,
                                timeout=timedelta(hours=2))
        waiting.cancel()
        return Ranks(dist.get_rank(), dist.get_world_size(), store)

    def stop(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: list) -> list:
        """This rank's share of a list: every world-th item."""
        return items[self.rank :: self.world]

    def gather(self, mine: list) -> list:
        """The lists of all ranks, one after the other."""
        if self.world == 1:
            return mine
        lists = [None] * self.world
        dist.all_gather_object(lists, mine)
        return [item for some in lists for item in some]

    def hand_out(self, count: int, work: Callable[[Iterator[int]], Iterator[list]]) -> Iterator:
        """What `work` makes of the numbers below `count`: for each of those that it is given, in their
        order, a list of what JSON can hold. Whoever is free takes the next number, so that nobody waits
        before the end. The first rank gets what others have made whenever it has made a list itself,
        and the others get all of it at the end."""
        if self.world == 1:
            for found in work(iter(range(count))):
                yield from found
            return
        store = dist.PrefixStore(self.ask_first(lambda: uuid4().hex), self.store)

        def free_numbers() -> Iterator[int]:
            while (number := store.add("taken", 1) - 1) < count:
                yield number

        mine = []
        told = 0  # lists of others that the first rank has got
        for found in work(free_numbers()):
            place = -1
            if self.first:
                yield from found
                while store.check([str(told)]):
                    yield from json.loads(store.get(str(told)))
                    store.delete_key(str(told))
                    told += 1
            else:
                place = store.add("told", 1) - 1
                store.set(str(place), json.dumps(found))
            mine.append((place, found))
        for place, found in self.gather(mine):
            if place >= told or not self.first:
                yield from found

    def ask_first(self, work: Callable):
        """What `work` returns on the first rank, which alone does it; all ranks get it. Raises
        DataError on all of them if it cannot be done."""
        answers = []
        if self.first:
            try:
                answers = [work()]
            except (DataError, OSError) as error:
                answers = [DataError(str(error))]
        (answer,) = self.gather(answers)
        if isinstance(answer, DataError):
            raise answer
        return answer

    def agree(self, settings: dict, file: str | Path, keys: list[Key], model=None) -> None:
        """Raises DataError on all ranks, naming what differs, unless all have the same settings, see
        the same file and the same videos, by name and size, and have loaded the same model, if any."""
        if self.world == 1:
            return
        sizes = [os.path.getsize(video) if os.path.isfile(video) else None for video, _ in keys]
        videos = json.dumps([keys, sizes]).encode()
        asked = {f"--{name.replace('_', '-')}": repr(value) for name, value in settings.items()}
        asked |= {str(file): digest(Path(file)), "the videos": hashlib.sha256(videos).hexdigest()}
        if model is not None:
            asked[f"the model {model.name}"] = of_model(model, model.name)
            asked["the instruction"] = of_json(model.processor.instruction)
        first, *others = self.gather([asked])
        for rank, other in enumerate(others, 1):
            differing = [name for name, value in first.items() if other.get(name) != value]
            if differing:
                raise DataError(f"rank {rank} is asked about something else than rank 0: "
                                f"{', '.join(differing)} differ")

    def sum(self, numbers: list[float]) -> list[float]:
        """Each number added up over all ranks."""
        if self.world == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.double)
        total = total.cuda() if torch.cuda.is_available() else total
        dist.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        """Returns when all ranks have come this far."""
        self.sum([0.0])


ALONE = Ranks()
