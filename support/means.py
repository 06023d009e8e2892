"""Figures of a step, added up over micro-batches and ranks."""

import math

import torch

from support.ranks import Ranks


class Means:
    """What is logged of a step: means, totals of its updates, and largest values, each by its name."""

    def __init__(self):
        # (name, update or None) → (Σ value · weight, Σ weight); of a total (Σ value, Σ weight)
        self.sums: dict[tuple[str, int | None], torch.Tensor] = {}
        self.maxima: dict[str, float] = {}  # by name

    def add(self, weight=1.0, **figures) -> None:
        """Figures to be averaged, with a weight that broadcasts to them."""
        for name, value in figures.items():
            value, by = torch.broadcast_tensors(numbers(value), numbers(weight))
            value = torch.where(by > 0, value * by, 0.0)
            self.put((name, None), value.sum(), by.sum())

    def total(self, weight=1.0, update: int = 0, **figures) -> None:
        """Parts of figures that add up over one of a step's updates, such as a loss over micro-batches;
        averaged over those updates in which any part had a weight."""
        for name, value in figures.items():
            self.put((name, update), numbers(value), numbers(weight).sum())

    def largest(self, **figures) -> None:
        """Figures of which the step's largest is logged; NaN, where there is one, is larger."""
        for name, value in figures.items():
            self.maxima[name] = larger(float(value), self.maxima.get(name, -math.inf))

    def put(self, key: tuple[str, int | None], value: torch.Tensor, weight: torch.Tensor) -> None:
        self.sums[key] = self.sums.get(key, 0.0) + torch.stack([value, weight])

    def over(self, ranks: Ranks) -> dict[str, float]:
        """The figures over all ranks; NaN where nothing had a weight."""
        sums: dict[tuple[str, int | None], list[float]] = {}
        for of_rank in ranks.gather([self.sums]):
            for key, (value, weight) in of_rank.items():
                before = sums.get(key, (0.0, 0.0))
                sums[key] = (before[0] + value.item(), before[1] + weight.item())
        totals: dict[str, tuple[float, float]] = {}
        for (name, update), (value, weight) in sums.items():
            if update is not None:  # a total: the updates in which it had a weight count as one each
                value, weight = (value, 1.0) if weight else (0.0, 0.0)
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + value, before[1] + weight)
        figures = {name: value / by if by else math.nan for name, (value, by) in totals.items()}
        for maxima in ranks.gather([self.maxima]):
            for name, value in maxima.items():
                figures[name] = larger(value, figures.get(name, -math.inf))
        return figures


def larger(a: float, b: float) -> float:
    return a if math.isnan(a) or a > b else b


def numbers(value) -> torch.Tensor:
    """A number or a tensor of any kind in float64 on the CPU, without its gradient."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
    return torch.as_tensor(value, dtype=torch.double)
