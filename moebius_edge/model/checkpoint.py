"""Loading a checkpoint, published or of a user's own, into a network: strictly, and never running code from it.

The tensors of the file are found under the names of the network and compared with it. Nothing of the size of the
network is read before all names, shapes and types agree. Does not download files or guess a configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints.network_names import (
    kind_of,
    network_tensors,
    refuse_other_network,
    some,
    unwrap_names,
)
from ..checkpoints.weights_file import open_weights
from ..errors import BundleError

_STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")  # of batch norms

Rename = Callable[[str], str]
Note = Callable[[str], None]


def print_note(text: str) -> None:
    """On stderr, as the command line prints its notes."""
    print(f"note: {text}", file=sys.stderr)


def load_checkpoint(
    module: nn.Module, path: str | Path, *, rename: Rename | None = None, note: Note = print_note
) -> None:
    """Loads the weights at ``path`` into ``module``, on the devices its tensors are on; on the CPU for one on ``meta``.

    Every name and shape must agree and every value be finite; ``module`` is untouched otherwise. Weights inside of a
    training checkpoint and names with prefixes are found, an average that lacks the batch norms' statistics takes those
    of the file beside it, and ``note`` is told of each. ``rename`` maps the file's names to the module's, where they
    differ.

    Raises UsageError for a folder, MachineError for a missing or unreadable file, BundleError for a file that is
    damaged, unsafe, of another network, of another shape or not finite.
    """
    path = Path(path)
    notes: list[str] = []
    expected = module.state_dict()
    tensors = _find(path, expected, rename, notes)
    missing = [name for name in expected if name not in tensors]
    if missing and all(name.endswith(_STATISTICS) for name in missing):  # as in an average over parameters
        beside = _file_beside(path)
        statistics = _find(beside, expected, rename, [])
        taken = {name: statistics[name] for name in missing if name in statistics}
        tensors |= taken
        notes.append(f"{path.name} has no batch-norm statistics: {len(taken)} tensors are taken from {beside.name}")
    _check_tensors(path, expected, tensors)
    form = torch.contiguous_format  # copied, for the file may change while the network is used
    state = {k: tensors[k].detach().to(e.dtype, copy=True, memory_format=form) for k, e in expected.items()}
    if bad := [name for name, tensor in state.items() if not _is_finite(tensor)]:
        problem = f"{path} has values that are not finite in tensors {some(bad)}"
        raise BundleError(problem, "copy or download it again")
    for text in notes:
        note(text)
    on_meta = any(tensor.is_meta for tensor in expected.values())
    module.load_state_dict(state, strict=True, assign=on_meta)


def _find(path: Path, expected: Mapping[str, Tensor], rename: Rename | None, notes: list[str]) -> dict[str, Tensor]:
    """The tensors of the file at ``path`` under the names of the network, as far as they are there."""
    tensors = network_tensors(path, open_weights(path).content, notes)
    kind = kind_of(expected)
    refuse_other_network(path, tensors, kind)
    if kind is not None:
        tensors = unwrap_names(path, expected, tensors, notes)
    return tensors if rename is None else {rename(name): tensor for name, tensor in tensors.items()}


def _file_beside(path: Path) -> Path:
    """The file that holds the same network with its statistics: ``weights.bin`` beside ``weights.EMA.bin``."""
    stem, dot, _ = path.name.partition(".EMA.")
    names = [f"{stem}{suffix}" for suffix in (path.suffix, ".safetensors", ".bin") if dot]
    beside = next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)
    if beside is None:
        remedy = f"put {names[0]}, the file that was saved with it, beside it" if dot else "give the file that has them"
        raise BundleError(f"{path} has the weights but not the batch norms' statistics", remedy)
    return beside


def _check_tensors(path: Path, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    there = {name: (tensors[name], tensor) for name, tensor in expected.items() if name in tensors}
    if not there:
        network = kind_of(expected) or "network"
        raise BundleError(f"{path} has tensors {some(tensors)}, none of a {network}", f"give a {network}'s weights")
    faults = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of other shapes": [
            f"{name} is {tuple(given.shape)}, expected {tuple(own.shape)}"
            for name, (given, own) in there.items()
            if given.shape != own.shape
        ],
        "of whole numbers": [
            f"{name} of {str(given.dtype).removeprefix('torch.')}"
            for name, (given, own) in there.items()
            if own.is_floating_point() and not given.is_floating_point()
        ],
    }
    if listed := ", ".join(f"{fault} {some(names)}" for fault, names in faults.items() if names):
        problem = f"{path} does not fit the network: tensors {listed}; it is of another configuration or quantised"
        raise BundleError(problem, "give the configuration it was trained with")


def _is_finite(tensor: Tensor) -> bool:
    """A tensor's sum is finite unless a value is not, or it overflows: only then each value is looked at."""
    if not tensor.is_floating_point():
        return True
    return bool(tensor.float().sum().isfinite()) or bool(tensor.isfinite().all())
