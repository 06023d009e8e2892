"""A model split over ranks: FSDP2 (`fully_shard`). Functions of a DeScore, `model`."""

from contextlib import contextmanager
from types import MethodType

import torch
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model) -> None:
    """Split parameters, their gradients and the optimiser's state over all ranks, the
    reference's too. A layer is gathered when it is needed. [Reward] and the head are small
    and stay whole."""
    half = None if model.dtype == torch.float32 else model.dtype
    reduce = half and torch.float32
    policy = MixedPrecisionPolicy(half, reduce_dtype=reduce, cast_forward_inputs=False)
    qwen = model.qwen.model
    blocks = [*qwen.visual.blocks, *qwen.language_model.layers]
    for block in blocks:
        fully_shard(block, mp_policy=policy)
    own = {model.query, *model.head.parameters()}
    fully_shard(model, mp_policy=policy, ignored_params=own)
    for part in (*blocks, model):  # gradients are added up over ranks, as those of what is whole
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # Gloo knows no other
    # Which block is gathered ahead in the backward. Left to itself FSDP goes by the order of
    # the forwards, those of thinking included, of which ranks make different numbers.
    for block, before in zip(blocks, [model, *blocks]):
        block.set_modules_to_backward_prefetch([before])
    # Each of these is a forward, which gathers what is in no block. The first forward settles
    # which module is the root; it must be the whole, so an empty one is made at once.
    model.begin = MethodType(lambda self: None, model)
    for method in ("begin", "think", "score", "group"):
        register_fsdp_forward_method(model, method)
    model.begin()
    model.reshard()  # a root stays whole after a forward; what is to be trained are its parts
    if model.reference:
        shard(model.reference)


def is_sharded(model) -> bool:
    return isinstance(model, FSDPModule)


@contextmanager
def gathered(model):
    """Within it a sharded model is whole on every rank and none waits for another: they may
    think as long as they like. For work without gradients; entered and left by all ranks
    together. Costs a copy of the weights, in the precision of the computation, for as long
    as it lasts. A model that is not sharded stays as it is."""
    modules = [*model.modules()]
    if model.reference:
        modules += model.reference.modules()
    parts = [part for part in modules if is_sharded(part)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        roots = (model, model.reference)
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part not in roots, recurse=False)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered from all ranks, on the CPU; any other as it is."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def shard_like(value, like: torch.Tensor):
    """Of a whole tensor this rank's shard, if `like` is sharded and of its shape; anything else, such
    as a count of steps, as it is."""
    can_split = isinstance(like, DTensor) and isinstance(value, torch.Tensor)
    if not can_split or value.shape != like.shape:
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
