"""What a run needs around the method: processes, optimiser step, folder, checkpoints, command line.

Nothing here knows what is trained. A run can be killed at any moment and goes on, bit for bit on a CPU, as if
it had not been: the data's order and every random number are functions of (seed, step), and all else is in
the checkpoint.
"""

import errno
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import HfArgumentParser

from data import DataError, Skipped
from model import DeScore, put_in_place, read_json, remove

# ------------------------------------------------------------------------------------------------------------
# Many processes


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started (or alone)."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def start() -> "Ranks":
        if "RANK" not in os.environ:
            return Ranks()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # torchrun keeps one store over its restarts. Under a name of each restart's own, no rank finds the
        # address of one that died. (Only hosts that all count alike can agree on such a name.)
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank,
                                world_size=world)
        return Ranks(dist.get_rank(), dist.get_world_size())

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
        """The whole list again, in order, from every rank's share."""
        if self.world == 1:
            return mine
        shares = [None] * self.world
        dist.all_gather_object(shares, mine)
        return [shares[i % self.world][i // self.world] for i in range(sum(map(len, shares)))]

    def gather_all(self, mine: list) -> list:
        """The lists of all ranks, one after the other."""
        if self.world == 1:
            return mine
        lists = [None] * self.world
        dist.all_gather_object(lists, mine)
        return [item for some in lists for item in some]

    def sum(self, numbers: list[float]) -> list[float]:
        """Each number added up over all ranks."""
        if self.world == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.double)
        total = total.cuda() if torch.cuda.is_available() else total
        dist.all_reduce(total)
        return total.tolist()

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return max(self.gather([number]))


# ------------------------------------------------------------------------------------------------------------
# A run: its folder, its checkpoints, its end


PATIENCE = 5  # so many steps in a row without a finite gradient end a run
# Settings that may differ from one start of a run to the next: they do not change what it computes.
FREE = ("out", "resume", "save_every", "keep", "workers", "max_skipped")


class Run:
    """A run's folder: the log, the checkpoints, and a lock that keeps a second run out.

    `args` holds out, resume, save_every and keep. A checkpoint is a directory checkpoints/step-N with
    state.json and rank-R.safetensors: what trains and the optimiser's state, or a rank's shards of both."""

    def __init__(self, args, ranks: Ranks):
        self.args, self.ranks, self.out = args, ranks, Path(args.out)
        self.checkpoints = self.out / "checkpoints"
        self.stop_asked, self.left_out = False, 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask_to_stop)
        if ranks.first:
            try:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                self.lock = (self.out / "lock").open("w")
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go when this dies
            except OSError as error:
                busy = error.errno in (errno.EACCES, errno.EAGAIN) and (self.out / "lock").is_file()
                reason = "another run is at work here" if busy else error
                raise DataError(f"{self.out}: {reason}") from error
            for left in [*self.checkpoints.glob("*.partial"), *self.checkpoints.glob("*.removed")]:
                shutil.rmtree(left)
        ranks.sum([0.0])  # the others wait

    def ask_to_stop(self, number, frame) -> None:
        """A first signal asks for an orderly end after this step; a second one is not waited for."""
        self.stop_asked = True
        signal.signal(number, signal.SIG_DFL)

    def begin(self, model: DeScore, optimizer: torch.optim.Optimizer, skipped: Skipped) -> int:
        """Take up the newest complete checkpoint, if any. Returns the step it was made after, else 0."""
        self.model, self.optimizer, self.skipped = model, optimizer, skipped
        self.parameters = model.trainable()
        self.optimized = [p for group in optimizer.param_groups for p in group["params"]]
        self.space()
        state = None
        if self.args.resume:
            for path in self.found()[::-1]:
                try:
                    state = self.load(path)
                except (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
                    if isinstance(error, Different):
                        raise
                    print(f"warning: {path}: passed over, it is broken ({error})", file=sys.stderr)
                if state:
                    break
        elif self.ranks.first:
            remove(self.checkpoints)
            self.checkpoints.mkdir()
        if self.ranks.first:
            self.metrics = (self.out / "metrics.jsonl").open("a", encoding="utf-8")
            self.metrics.truncate(state["metrics_bytes"] if state else 0)  # later steps are done again
            if state:
                print(f"{self.out}: going on after step {state['step']}", flush=True)
        if state:
            skipped.restore(state["skipped"])
        return state["step"] if state else 0

    def found(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(self.checkpoints.glob("step-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))

    def space(self) -> None:
        """Raises DataError if the disk cannot hold `keep` + 1 checkpoints: weights and their two moments."""
        size = 3 * sum(p.numel() * p.element_size() for p in self.parameters.values()) * (self.args.keep + 1)
        free = shutil.disk_usage(self.out).free if self.ranks.first else size
        if free < size:
            raise DataError(f"{self.out}: {free / 1e9:.1f} GB are free, the checkpoints need about "
                            f"{size / 1e9:.1f} GB")

    def log(self, record: dict) -> None:
        """Add a record to metrics.jsonl; what is not finite becomes null."""
        if self.ranks.first:
            record = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                      for key, value in record.items()}
            self.metrics.write(json.dumps(record) + "\n")
            self.metrics.flush()

    def descend(self, max_norm: float) -> float:
        """One optimiser step on the gradients of all ranks together, clipped to a norm. The losses divide by
        counts over all ranks, so that the sum of the ranks' gradients is the gradient of the global batch.
        Returns the norm before clipping. A step whose gradient is not finite is left out; DataError after
        `PATIENCE` such in a row."""
        used = self.ranks.sum([float(p.grad is not None) for p in self.optimized])
        parameters = [p for p, by in zip(self.optimized, used) if by]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        shards = [p.grad.to_local() for p in parameters if isinstance(p, DTensor)]
        wholes = [p.grad for p in parameters if not isinstance(p, DTensor)]
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
        if math.isfinite(norm):
            torch._foreach_mul_(shards + wholes, min(1.0, max_norm / (norm + 1e-6)))
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.left_out = 0 if math.isfinite(norm) else self.left_out + 1
        if self.left_out >= PATIENCE:
            raise DataError(f"{self.out}: the gradients of {PATIENCE} steps in a row were not finite; the "
                            "last checkpoint is from before them. A smaller --lr may help")
        return norm

    def step_done(self, step: int, last: int) -> bool:
        """To be called after each step: saves a checkpoint when one is due. True if the run is to stop."""
        (stop,) = self.ranks.sum([float(self.stop_asked)])
        if stop or step == last or (self.args.save_every and step % self.args.save_every == 0):
            self.save(step)
        if stop and self.ranks.first:
            print(f"{self.out}: stopped after step {step} of {last}; the same command goes on from here",
                  flush=True)
        return bool(stop)

    def save(self, step: int) -> None:
        """Write a checkpoint beside its place, then rename it; drop the oldest beyond `keep`."""
        place = self.checkpoints / f"step-{step}"
        beside = place.with_name(place.name + ".partial")
        if self.ranks.first:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
        self.ranks.sum([0.0])
        optimizer = {i: self.optimizer.state[p] for i, p in enumerate(self.optimized)
                     if p in self.optimizer.state}
        tensors = {f"weight/{name}": p for name, p in self.parameters.items()}
        tensors |= {f"optimizer/{i}/{key}": value for i, state in optimizer.items()
                    for key, value in state.items() if isinstance(value, torch.Tensor)}
        numbers = {f"{i}/{key}": value for i, state in optimizer.items() for key, value in state.items()
                   if isinstance(value, (int, float))}
        sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
        try:
            if self.ranks.first or sharded:
                mine = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
                save_file({name: t.detach().to("cpu", copy=True).contiguous() for name, t in mine.items()},
                          beside / f"rank-{self.ranks.rank}.safetensors")
            self.ranks.sum([0.0])
            if self.ranks.first:
                state = {"step": step, "ranks": self.ranks.world if sharded else None,
                         "args": asdict(self.args), "metrics_bytes": self.metrics.tell(),
                         "skipped": self.skipped.records, "optimizer": numbers}
                (beside / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
                put_in_place(beside, place)
                for old in self.found()[: -max(self.args.keep, 1)]:
                    remove(old)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise DataError(f"{place}: could not be written ({error}); earlier checkpoints are as they "
                            "were") from error

    def load(self, path: Path) -> dict:
        """Put a checkpoint's weights and optimiser state in place."""
        state = read_json(path / "state.json")
        args = asdict(self.args)
        differences = [f"--{key.replace('_', '-')} was {value}, is {args.get(key)}"
                       for key, value in state["args"].items() if key not in FREE and args.get(key) != value]
        if state["ranks"] not in (None, self.ranks.world):
            differences.append(f"sharded over {state['ranks']} processes, now there are {self.ranks.world}")
        if differences:
            raise Different(f"{path}: made with other settings ({'; '.join(differences)}). Give another "
                            "--out, or --resume false to start anew")
        tensors = load_file(path / f"rank-{self.ranks.rank if state['ranks'] else 0}.safetensors")
        weights = {name: tensors[f"weight/{name}"] for name in self.parameters}  # all there, or none used
        optimizer = {}
        numbers = {f"optimizer/{name}": number for name, number in state["optimizer"].items()}
        for name, value in [*tensors.items(), *numbers.items()]:
            if name.startswith("optimizer/"):
                _, i, key = name.split("/")
                like = self.optimized[int(i)]
                if isinstance(like, DTensor) and isinstance(value, torch.Tensor) and value.ndim:
                    value = DTensor.from_local(value.to(self.model.device), like.device_mesh, like.placements,
                                               shape=like.shape, stride=like.stride())
                optimizer.setdefault(int(i), {})[key] = value
        for name, parameter in self.parameters.items():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.data.copy_(weights[name])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": optimizer, "param_groups": groups})
        return state


class Different(DataError):
    """A checkpoint of other settings."""


def make_optimizer(kind: str, groups: list[dict], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW over groups of parameters: "adamw", or "adamw8bit" whose moments take a quarter of the memory
    (arXiv 2110.02861)."""
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
    if any(isinstance(p, DTensor) for group in groups for p in group["params"]):
        raise DataError("--optim adamw8bit does not work on sharded parameters")
    import bitsandbytes  # slow to import, and nothing else here needs it

    return bitsandbytes.optim.AdamW8bit(groups, lr=lr, weight_decay=weight_decay)


# ------------------------------------------------------------------------------------------------------------
# The command line, and the embedded default


def parse_args(Args: type, preset: str, ranks: Ranks):
    """Read the command line into a stage's Args. With no --train, what is not given comes from the embedded
    default's preset, and its clips are rendered and annotated on first use."""
    parser, root = HfArgumentParser(Args), Path(__file__).resolve().parent
    (args,) = parser.parse_args_into_dataclasses()
    if args.train is None:
        chosen = json.loads((root / preset).read_text())
        for key in ("backbone", "model"):
            if str(chosen.get(key, "")).startswith("toy/"):
                chosen[key] = str(root / chosen[key])
        parser.set_defaults(**chosen)
        (args,) = parser.parse_args_into_dataclasses()
        folder = Path(args.train).parent
        if ranks.first and not Path(args.train).is_file():
            print(f"{folder}: rendering the clips of the embedded default (once)", flush=True)
            subprocess.run([sys.executable, str(root / "toy/prepare.py"), str(folder)], check=True)
        ranks.sum([0.0])  # the others wait
    return args
