"""Fully sharded data parallelism: each process holds its share of every weight, gradient and optimiser state.

PyTorch's FSDP2 (``torch.distributed.fsdp.fully_shard``), which shards by rows and gathers a block's weights only
while the block runs. Not Accelerate's own path to it: that engages on accelerators alone, and exchanges the
optimiser's parameters, of which Muon's are views. So the same code runs on CPUs and on GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import UsageError
from ..model.unet import Block

_REQUEST = "ACCELERATE_USE_FSDP"


def launcher_asks() -> bool:
    """Whether ``accelerate launch --use_fsdp`` started this process.

    Raises UsageError if it also asks for weights in the CPU's memory, which is not done here.
    """

    def on(name: str) -> bool:
        return os.environ.get(name, "false").lower() in ("1", "true")

    if not on(_REQUEST):
        return False
    if on("FSDP_OFFLOAD_PARAMS"):
        raise UsageError("the launcher asks for fsdp_offload_params, which is not supported: set it to false")
    return True


@contextmanager
def request_hidden() -> Iterator[None]:
    """Accelerate, made inside, does not hear the launcher ask: it would prepare its own FSDP, and fail on a CPU."""
    request = os.environ.pop(_REQUEST, None)
    try:
        yield
    finally:
        if request is not None:
            os.environ[_REQUEST] = request


def shard(network: nn.Module, device: torch.device) -> None:
    """Shards ``network``, a student or teacher with whole weights on ``device``, in place.

    A unit is a block of the U-Net, since gradient checkpointing works inside one; what lies outside is a unit, too.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in network.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """This process's share of ``tensor``, all of it if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` gathered, in every process: every one has to call it. Itself if it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_of(tensor: Tensor, like: object) -> Tensor:
    """The share of a whole ``tensor`` that ``like`` holds, if it is sharded and of the same shape; else all of it."""
    if not isinstance(like, DTensor) or like.shape != tensor.shape:
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def whole_state(state: Any, keep: bool = True) -> Any:
    """A state dict with its sharded tensors gathered into the CPU's memory, one after the other.

    Every process has to call it. Without ``keep`` nothing is left of them: one process writes for all.
    """
    if isinstance(state, dict):
        return {name: whole_state(value, keep) for name, value in state.items()}
    if isinstance(state, list):
        return [whole_state(value, keep) for value in state]
    if isinstance(state, DTensor):
        gathered = state.full_tensor()
        return gathered.cpu() if keep else None
    return state


def load_whole(module: nn.Module, state: dict[str, Tensor]) -> None:
    """``load_state_dict`` of whole tensors, whether ``module`` is sharded or not."""
    now = module.state_dict()
    module.load_state_dict({name: share_of(tensor, now.get(name)) for name, tensor in state.items()})
