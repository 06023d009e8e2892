"""Figures of a step, added up over micro-batches and ranks."""

import math

import torch

from support.ranks import Ranks


class Means:
    """What is logged of a step: means, totals of its updates, and largest values, each by its name."""

    def __init__(self):
        # (name, update or None) → (Σ value · weight, Σ weight); of a total (Σ value, Σ weight)
        self.sums: dict[tuple[str, int | None], torch.Tensor] = {}
        self.most: dict[str, float] = {}  # name → the largest value

    def add(self, weight=1.0, **figures) -> None:
        """Figures to be averaged; a weight of the same shape, or one for all."""
        for name, value in figures.items():
            value, by = torch.broadcast_tensors(numbers(value), numbers(weight))
            value = torch.where(by > 0, value * by, 0.0)
            self.put((name, None), value.sum(), by.sum())

    def total(self, update: int, weight=1.0, **figures) -> None:
        """Parts of figures that add up over one of a step's updates; averaged over those updates in
        which any part had a weight."""
        for name, value in figures.items():
            self.put((name, update), numbers(value), numbers(weight).sum())

    def largest(self, **figures) -> None:
        """Figures of which the step's largest is logged; NaN, where there is one, is larger."""
        for name, value in figures.items():
            self.most[name] = larger(float(value), self.most.get(name, -math.inf))

    def put(self, key: tuple[str, int | None], value: torch.Tensor, weight: torch.Tensor) -> None:
        self.sums[key] = self.sums.get(key, 0.0) + torch.stack([value, weight])

    def over(self, ranks: Ranks) -> dict[str, float]:
        """The figures over all ranks; NaN where nothing had a weight."""
        flat = ranks.sum(torch.cat(list(self.sums.values())).tolist())
        totals: dict[str, tuple[float, float]] = {}
        for (name, update), value, weight in zip(self.sums, flat[::2], flat[1::2]):
            if update is not None:
                value, weight = (value, 1.0) if weight else (0.0, 0.0)
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + value, before[1] + weight)
        figures = {name: value / by if by else math.nan for name, (value, by) in totals.items()}
        for most in ranks.gather([self.most]):
            for name, value in most.items():
                figures[name] = larger(value, figures.get(name, -math.inf))
        return figures


def larger(a: float, b: float) -> float:
    return a if math.isnan(a) or a > b else b


def numbers(value) -> torch.Tensor:
    """A number or a tensor of any kind in float64 on the CPU, without its gradient."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
    return torch.as_tensor(value, dtype=torch.double)
