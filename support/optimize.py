"""An optimiser, and the gradients of all ranks together."""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from support.ranks import Ranks


def adamw(groups: list[dict], weight_decay: float, kind: str = "adamw") -> torch.optim.Optimizer:
    """AdamW over groups of parameters, {"params": [...], "lr": rate}. kind "adamw8bit": its moments
    have 8 bits and a quarter of the size (arXiv 2110.02861)."""
    if kind == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit  # slow to import

        return AdamW8bit(groups, weight_decay=weight_decay)
    for group in groups:
        # The fused step makes no copies. It takes no shards together with what is whole.
        kinds = {isinstance(p, DTensor) for p in group["params"]}
        group["fused"] = len(kinds) == 1
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


def all_reduce(parameters: list[Tensor], ranks: Ranks) -> None:
    """Add up the gradients of all ranks, in one message. Those of shards FSDP has added up in the
    backward (support/shard.py). All ranks have gradients of the same parameters, [Reward] among them,
    which is never sharded: in each micro-batch of a rank each parameter has a part."""
    if ranks.world == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    wholes = [grad for grad in gradients if not isinstance(grad, DTensor)]
    flat = torch.cat([grad.flatten() for grad in wholes])
    dist.all_reduce(flat)
    sizes = [grad.numel() for grad in wholes]
    for grad, summed in zip(wholes, flat.split(sizes)):
        grad.copy_(summed.view_as(grad))


def clip(parameters: list[Tensor], max_norm: float) -> float:
    """Scale gradients so that their norm, over all parameters, is at most `max_norm`. Returns the norm
    before; where it is not finite the gradients stay as they are."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    wholes = [grad for grad in gradients if not isinstance(grad, DTensor)]
    shards = [grad for grad in gradients if isinstance(grad, DTensor)]
    norm = torch.nn.utils.get_total_norm(wholes).item()
    if shards:
        of_shards = torch.nn.utils.get_total_norm(shards).full_tensor().item()
        norm = (norm**2 + of_shards**2) ** 0.5
    if math.isfinite(norm):
        scale = min(1.0, max_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        torch._foreach_mul_(wholes, scale)
        if shards:
            torch._foreach_mul_(shards, scale)
    return norm
