"""What the engines of a bundle take on the GPU, known before they are loaded, and the refusal where it is too much.

Weights, activations and what each context holds for itself are the figures that TensorRT logged while it built; buffers
follow from the tensors. Of the activations the largest counts alone, for all contexts compute in one piece of memory.
What CUDA and TensorRT take for themselves is not in it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import OutOfMemory
from ..spec import DENOISER, SHALLOW
from ..system.machine import available_memory_bytes
from .cuda import Cuda, Gpu
from .engine_files import Engine, Variant, build_command
from .latent_loop import UPDATE, shared_tensors, tensor_bytes, update_component

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle


@dataclass(frozen=True)
class GraphMemory:
    """Of one engine. ``activation_bytes`` is None where the build has not logged it."""

    graph: str
    weights_bytes: int
    activation_bytes: int | None
    contexts_bytes: int
    buffers_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """Of all engines of a bundle, for ``pictures`` at a time. ``integrated``: the GPU shares the host's memory."""

    graphs: tuple[GraphMemory, ...]
    pictures: int
    integrated: bool

    @property
    def weights_bytes(self) -> int:
        return sum(graph.weights_bytes for graph in self.graphs)

    @property
    def activation_bytes(self) -> int:
        return max(graph.activation_bytes or 0 for graph in self.graphs)

    @property
    def contexts_bytes(self) -> int:
        return sum(graph.contexts_bytes for graph in self.graphs)

    @property
    def buffers_bytes(self) -> int:
        return sum(graph.buffers_bytes for graph in self.graphs)

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.activation_bytes + self.contexts_bytes + self.buffers_bytes

    def to_dict(self) -> dict[str, Any]:
        sums = ("weights_bytes", "activation_bytes", "contexts_bytes", "buffers_bytes", "total_bytes")
        graphs = [asdict(graph) for graph in self.graphs]
        return {"graphs": graphs, "pictures": self.pictures, **{name: getattr(self, name) for name in sums}}

    def pictures_in(self, free: int) -> int:
        """How many pictures at a time fit in ``free`` bytes; activations and buffers are in proportion to them."""
        each = (self.activation_bytes + self.buffers_bytes) / self.pictures
        return max(0, math.floor((free - self.weights_bytes - self.contexts_bytes) / each))


def plan_memory(bundle: Bundle, engine: Engine, gpu: Gpu | None) -> MemoryPlan:
    """The plan for ``engine``; buffers of an integrated GPU and their twins on the host are in the same memory."""
    integrated, pictures = gpu is not None and gpu.integrated, engine.settings["max_batch"]
    graphs = []
    update = update_component(bundle.latent_size, bundle.latent_channels)
    for component in (*bundle.components.values(), update):
        record, rows = engine.plans[component.name], engine.profiles[component.name][2]
        own = [t for t in (*component.inputs, *component.outputs) if t.name not in shared_tensors(component)]
        buffers = sum(tensor_bytes(t, rows) for t in own) * (2 if integrated else 1)
        weights = record.get("weights_bytes")
        weights = record["bytes"] if weights is None else weights
        branches = bundle.branches if component.name in (DENOISER, SHALLOW, UPDATE) else 1
        contexts = len({1, branches, pictures, branches * pictures})  # those that are made on loading
        persistent = contexts * (record.get("persistent_bytes") or 0)
        graphs.append(GraphMemory(component.name, weights, record.get("activation_bytes"), persistent, buffers))
    return MemoryPlan(tuple(graphs), pictures, integrated)


def free_memory(gpu_is_integrated: bool, cuda: Cuda) -> int:
    """Bytes that engines can take: an integrated GPU shares the host's memory, but cannot use its swap."""
    available = available_memory_bytes(swap=False) if gpu_is_integrated else None
    return cuda.free_memory() if available is None else available


def check_fits(plan: MemoryPlan, bundle: Bundle, variant: Variant, cuda: Cuda) -> None:
    """Raise ``OutOfMemory``, with what would make it fit, where ``plan`` needs more memory than is free."""
    free = free_memory(plan.integrated, cuda)
    if plan.total_bytes <= free:
        return
    rest = plan.contexts_bytes + plan.buffers_bytes
    need, has, weights, activation, buffers = (
        f"{size / 1e9:.2f} GB" for size in (plan.total_bytes, free, plan.weights_bytes, plan.activation_bytes, rest)
    )
    where = (
        "of the memory that the GPU shares with the system (swap does not help)" if plan.integrated else "on the GPU"
    )
    problem = (
        f"the engines for {plan.pictures} at a time need {need} (weights {weights}, activations {activation}, "
        f"buffers {buffers}) and {has} {where} are free"
    )
    fewer = plan.pictures_in(free)
    if fewer:
        remedy = f"run `{build_command(bundle, variant)}` with --max-batch {fewer}"
    elif bundle.precision == "float32":
        remedy = "export the bundle with --precision fp16, which takes about half"
    else:
        remedy = "use a GPU with more memory"
    raise OutOfMemory(problem, f"close other programs until {need} are free, or {remedy}")
