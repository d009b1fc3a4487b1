"""Where a network's time goes by class of operator, and how little each class could take."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

LOCAL = "local lambda"
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_addmm_activation", "interactive_lambda")
_GATHERS = ("index", "index_select", "gather", "embedding", "constant_pad_nd")
_COPIES = ("copy_", "cat", "clone", "_to_copy", "fill_", "zero_")


def operator_class(name: str) -> str:
    """The class of an operator of PyTorch, such as ``aten::mm``."""
    base = name.rpartition("::")[2]
    if base == "local_lambda":
        return LOCAL
    if "conv" in base and "convert" not in base:
        return "convolutions"
    for kind, names in (("products", _PRODUCTS), ("gathers", _GATHERS), ("copies", _COPIES)):
        if base in names:
            return kind
    return "normalisation and elementwise"


def kernel_shares(network: nn.Module, inputs: Sequence[Tensor], local: type[Any], calls: int) -> dict[str, Any]:
    """Kernel milliseconds of one call by class, and the kernels that take longest; on a CPU the operators' own time.

    What ``lambdas`` of the modules of type ``local`` calls is apart, "local lambda, CLASS". A kernel that no operator
    of PyTorch launched is Triton's.
    """
    for module in network.modules():
        if isinstance(module, local):
            module.lambdas = _named(module.lambdas)
    gpu = inputs[0].is_cuda
    for _ in range(3 if gpu else 0):
        network(*inputs)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(calls):
            network(*inputs)
        if gpu:
            torch.cuda.synchronize()
    classes: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == DeviceType.CPU and event.name.startswith(("aten::", "moebius::")):
            time = sum(kernel.duration for kernel in event.kernels) if gpu else event.self_cpu_time_total
            if time:
                classes[(f"{LOCAL}, " if _inside(event) else "") + operator_class(event.name)] += time
        elif event.device_type == DeviceType.CUDA and event.name != LOCAL:
            kernels[event.name] += event.time_range.elapsed_us()
    total = sum((kernels if gpu else classes).values())
    if own := sum(time for name, time in kernels.items() if "local_window" in name):
        classes[f"{LOCAL}, fused kernel"] = own
    classes["other"] = total - sum(classes.values())
    ms: Callable[[float], float] = lambda us: round(us / calls / 1000, 4)  # noqa: E731
    return {
        "ms": ms(total),
        "classes": {name: {"ms": ms(us), "percent": round(100 * us / total, 1)} for name, us in classes.most_common()},
        "kernels": {name[:120]: ms(us) for name, us in kernels.most_common(20)},
    }


def _named(lambdas: Callable[..., Any]) -> Callable[..., Any]:
    def named(*inputs: Any) -> Any:
        with record_function(LOCAL):
            return lambdas(*inputs)

    return named


def _inside(event: Any) -> bool:
    while event is not None:
        if event.name == LOCAL:
            return True
        event = event.cpu_parent
    return False


class _Counting(TorchDispatchMode):
    """Notes of every operator that computes something its class, multiply-adds and bytes read and written."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.calls: list[tuple[str, float, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        views = any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)
        if not views and schema.name not in ("aten::_unsafe_view", "aten::empty", "aten::detach"):
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            size = sum(t.numel() * t.element_size() for t in tensors)
            self.calls.append((operator_class(schema.name), self._macs(func, args, kwargs or {}, result), size))
        return result

    def _macs(self, func: Any, args: Any, kwargs: Any, result: Any) -> float:
        name = func._schema.name
        if name == "moebius::local_lambda":
            v, weight = args[2], args[3]
            rows, positions, keys = v.shape
            return rows * positions * (self.heads * keys * (2 * weight.shape[1] + keys) + keys * keys)  # type: ignore[no-any-return]
        if name == "moebius::interactive_lambda":
            q, keys, values = args[:3]
            return q.numel() // q.shape[3] * keys.shape[-1] * (q.shape[3] + values.shape[-1])  # type: ignore[no-any-return]
        formula = flop_registry.get(func._overloadpacket)
        return formula(*args, **kwargs, out_val=result) / 2 if formula else 0


def floors(
    network: nn.Module, inputs: Sequence[Tensor], heads: int, peaks: Mapping[str, float] | None = None
) -> dict[str, dict[str, float]]:
    """Multiply-adds (10⁹) and bytes (10⁹) of one call by class, and with ``peaks`` of the card the least milliseconds.

    ``network`` is the rewritten student, whose local operators count as one each, at their true window.
    """
    with _Counting(heads) as counting:
        network(*inputs)
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for kind, macs, size in counting.calls:
        found[kind]["gmacs"] += macs / 1e9
        found[kind]["gb"] += size / 1e9
        if peaks and "fp16_tflops" in peaks and "copy_gb_per_s" in peaks:
            found[kind]["floor_ms"] += max(2 * macs / peaks["fp16_tflops"] / 1e9, size / peaks["copy_gb_per_s"] / 1e6)
    return {kind: dict(values) for kind, values in found.items()}
