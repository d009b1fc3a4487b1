"""Loading a checkpoint, published or of a user's own, into a network: strictly, and never running code from it.

The file is opened by ``weights_file``; here its tensors are found under the names of the network, compared with it and
read. Nothing of the size of the network is read before all names, shapes and types agree. Does not find or download
files, and does not guess a configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints.inert_pickle import Storage, StoredTensor
from ..checkpoints.network_names import (
    Tensors,
    kind_of,
    lacks_statistics,
    network_tensors,
    refuse_other_network,
    some,
    unwrap_names,
)
from ..checkpoints.weights_file import WeightsFile, open_weights
from ..errors import BundleError

_OTHER_CONFIG = "the file is of another configuration: give the configuration it was trained with"
_GET_AGAIN = "copy or download it again"

Rename = Callable[[str], str]
Note = Callable[[str], None]


def print_note(text: str) -> None:
    """On stderr, as the command line prints its notes."""
    print(f"note: {text}", file=sys.stderr)


def load_checkpoint(
    module: nn.Module, path: str | Path, *, rename: Rename | None = None, note: Note = print_note
) -> None:
    """Loads the weights at ``path`` into ``module``, on the devices its tensors are on; a module on ``meta`` gets the
    CPU's.

    Every name and shape must agree and every value be finite; ``module`` is untouched otherwise. Weights inside of a
    training checkpoint and names with prefixes are found, an average that lacks the batch norms' statistics takes those
    of the file beside it, and ``note`` is told of each. ``rename`` maps the file's names to the module's, where they
    differ.

    Raises UsageError for a folder, MachineError for a missing or unreadable file, BundleError for a file that is
    damaged, unsafe, of another network, of another shape or not finite.
    """
    notes: list[str] = []
    expected = module.state_dict()
    state = _matching_state(Path(path), expected, rename, notes)
    bad = [name for name, tensor in state.items() if not _is_finite(tensor)]
    if bad:
        raise BundleError(f"{path} has values that are not finite in tensors {some(bad)}: {_GET_AGAIN}")
    for text in notes:
        note(text)
    on_meta = any(tensor.is_meta for tensor in expected.values())
    module.load_state_dict(state, strict=True, assign=on_meta)


def _matching_state(
    path: Path, expected: Mapping[str, Tensor], rename: Rename | None, notes: list[str]
) -> dict[str, Tensor]:
    """The tensors of the file under the names ``expected``, in their types."""
    file = open_weights(path)
    tensors = _find(file, expected, rename, notes)
    sources = dict.fromkeys(tensors, file)
    if lacks_statistics(expected, tensors):
        beside, statistics = _file_beside(path, expected, rename)
        taken = [name for name in expected if name not in tensors and name in statistics]
        tensors = {**tensors, **{name: statistics[name] for name in taken}}
        sources |= dict.fromkeys(taken, beside)
        notes.append(
            f"{path.name} has no batch-norm statistics: {len(taken)} tensors are taken from {beside.path.name}"
        )
    _check_tensors(path, expected, tensors)
    buffers: dict[tuple[Path, Storage], bytearray] = {}
    state = {}
    for name, wanted in expected.items():
        stored, source = tensors[name], sources[name]
        key = (source.path, stored.storage)
        if key not in buffers:
            buffers[key] = source.read(stored.storage)
        state[name] = _tensor(stored, buffers[key]).to(wanted.dtype)
    return state


def _find(file: WeightsFile, expected: Mapping[str, Tensor], rename: Rename | None, notes: list[str]) -> Tensors:
    tensors = network_tensors(file.path, file.content, notes)
    wanted = kind_of(expected)
    refuse_other_network(file.path, tensors, wanted)
    if wanted is not None:
        tensors = unwrap_names(file.path, expected, tensors, notes)
    return tensors if rename is None else {rename(name): tensor for name, tensor in tensors.items()}


def _file_beside(path: Path, expected: Mapping[str, Tensor], rename: Rename | None) -> tuple[WeightsFile, Tensors]:
    """The file that holds the same network with its statistics: ``weights.bin`` beside ``weights.EMA.bin``."""
    stem, dot, _ = path.name.partition(".EMA.")
    names = [f"{stem}{suffix}" for suffix in (path.suffix, ".safetensors", ".bin") if dot]
    beside = next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)
    if beside is None:
        wanted = f"put {names[0]}, the file that was saved with it, beside it" if dot else "give the file that has them"
        raise BundleError(f"{path} has the weights but not the batch norms' statistics: {wanted}")
    file = open_weights(beside)
    return file, _find(file, expected, rename, [])


def _check_tensors(path: Path, expected: Mapping[str, Tensor], tensors: Tensors) -> None:
    missing = [name for name in expected if name not in tensors]
    if len(missing) == len(expected):
        network = kind_of(expected) or "network"
        raise BundleError(f"{path} has tensors {some(tensors)}, none of a {network}: give a {network}'s weights")
    unexpected = [name for name in tensors if name not in expected]
    if missing or unexpected:
        faults = {"missing": missing, "unexpected": unexpected}
        listed = ", ".join(f"{fault} {some(names)}" for fault, names in faults.items() if names)
        raise BundleError(f"{path} does not fit the network: tensors {listed}; {_OTHER_CONFIG}")
    shapes = {
        f"{name} is {tensors[name].shape}, expected {tuple(wanted.shape)}"
        for name, wanted in expected.items()
        if tensors[name].shape != tuple(wanted.shape)
    }
    if shapes:
        raise BundleError(
            f"{path} does not fit the network: tensors of other shapes {some(sorted(shapes))}; {_OTHER_CONFIG}"
        )
    types = [
        f"{name} of {tensors[name].dtype}"
        for name, wanted in expected.items()
        if wanted.is_floating_point() and "float" not in tensors[name].dtype
    ]
    if types:
        raise BundleError(
            f"{path} has whole numbers where weights belong, {some(types)}: give the weights before quantisation"
        )


def _tensor(stored: StoredTensor, data: bytearray) -> Tensor:
    dtype = getattr(torch, stored.dtype)
    if 0 in stored.shape:
        return torch.empty(stored.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).as_strided(stored.shape, stored.strides, stored.offset).contiguous()


def _is_finite(tensor: Tensor) -> bool:
    """A tensor's sum is finite unless a value is not, or it overflows: only then each value is looked at."""
    if not tensor.is_floating_point():
        return True
    return bool(tensor.float().sum().isfinite()) or bool(tensor.isfinite().all())
