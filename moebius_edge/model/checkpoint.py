"""Loading a published checkpoint, or one of ours, into a network: strictly, and never running code from it.

A checkpoint is a flat state dict: a torch pickle (.bin, .pt, .pth) or a .safetensors file. Does not find or
download files, and does not guess a configuration.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import BundleError, MachineError, UsageError

PICKLES = (".bin", ".pt", ".pth")
SAFETENSORS = ".safetensors"
_HEAD_BYTES = 1 << 20  # enough of a bare pickle to see what it names
# How torch's restricted unpickler words its refusal of a name, a call or an object.
_REFUSED_CODE = ("GLOBAL ", "call reduce", "create new object", "Can only build")
_NAMED = 3  # how many tensors an error names

_GET_AGAIN = "copy or download it again"
_OTHER_CONFIG = "the file is of another configuration: give the configuration it was trained with"


def load_checkpoint(module: nn.Module, path: str | Path) -> None:
    """Loads the weights at ``path`` into ``module``, on the devices its tensors are on.

    Every key and shape must agree and every value be finite; ``module`` is untouched otherwise.

    Raises UsageError for an unknown file type, MachineError for a missing or unreadable file or a missing
    package, BundleError for a damaged, unsafe, mismatching or non-finite checkpoint.
    """
    path = Path(path)
    state = read_state(path)
    _check_names(path, module.state_dict(), state)
    _check_values(path, state)
    module.load_state_dict(state, strict=True)


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in the file at ``path``, on the CPU. Raises as ``load_checkpoint``."""
    suffix = path.suffix.lower()
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise UsageError(f"{path} is a folder; give the checkpoint file in it")
        if suffix != SAFETENSORS and suffix not in PICKLES:
            raise UsageError(f"{path} is no checkpoint by its name; give a {', '.join(PICKLES)} or {SAFETENSORS} file")
        if size == 0:
            raise BundleError(f"{path} is empty; {_GET_AGAIN}")
        state = _read_safetensors(path) if suffix == SAFETENSORS else _read_pickle(path)
    except FileNotFoundError:
        raise MachineError(
            f"{path} does not exist; `moebius-edge download places2` fetches the published checkpoint"
        ) from None
    except OSError as error:
        raise MachineError(f"{path} cannot be read: {error.strerror or error}; give a readable file") from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise BundleError(f"{path} holds no flat dictionary of tensors; save module.state_dict() itself")
    return dict(state)


def _read_pickle(path: Path) -> object:
    with path.open("rb") as file:
        pickled = file.read(_HEAD_BYTES)
    if zipfile.is_zipfile(path):
        # torch does not compare the archive's checksums; a flipped bit would become a weight.
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
                pickled = b"".join(archive.read(n) for n in archive.namelist() if n.endswith("data.pkl"))
        except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, UnicodeDecodeError) as error:
            raise BundleError(f"{path} is damaged; {_GET_AGAIN}") from error
        if damaged is not None:
            raise BundleError(f"{path} is damaged at {damaged!r}; {_GET_AGAIN}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a pickle that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        if isinstance(error, pickle.UnpicklingError) and _asks_for_code(str(error), pickled):
            raise BundleError(
                f"{path} was refused: its pickle asks to run code, which a file of weights never needs; "
                "do not trust its source"
            ) from error
        raise BundleError(f"{path} is truncated or no torch file; {_GET_AGAIN}") from error


def _asks_for_code(refusal: str, pickled: bytes) -> bool:
    """Whether torch's ``refusal`` is of a name or a call, rather than of bytes that are no pickle."""
    if any(sign in refusal for sign in _REFUSED_CODE):
        return True
    # torch stops at the framing of newer pickles, before the names it would refuse.
    stream = io.BytesIO(pickled)
    try:
        while stream.tell() < len(pickled):  # torch's older format is several pickles in a row
            if any(opcode.name == "STACK_GLOBAL" for opcode, _, _ in pickletools.genops(stream)):
                return True
    except ValueError:
        pass  # no pickle from here on
    return False


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise MachineError(f'{path} needs safetensors; run: pip install "moebius-edge[export]"') from None
    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise BundleError(f"{path} is truncated or no safetensors file ({error}); {_GET_AGAIN}") from error


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return f"{len(names)} ({', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''})"


def _check_names(path: Path, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    if missing or unexpected:
        faults = {"missing": missing, "unexpected": unexpected}
        told = ", ".join(f"{fault} {_some(names)}" for fault, names in faults.items() if names)
        raise BundleError(f"{path} does not fit the network: tensors {told}; {_OTHER_CONFIG}")
    wrong = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if state[key].shape != tensor.shape
    ]
    if wrong:
        raise BundleError(f"{path} does not fit the network: tensors of other shapes {_some(wrong)}; {_OTHER_CONFIG}")


def _check_values(path: Path, state: Mapping[str, Tensor]) -> None:
    # A tensor's sum is finite unless a value is not, or it overflows: only then look at each value.
    bad = [
        key
        for key, tensor in state.items()
        if tensor.is_floating_point()
        and not bool(tensor.float().sum().isfinite())
        and not bool(tensor.isfinite().all())
    ]
    if bad:
        raise BundleError(f"{path} has values that are not finite in tensors {_some(bad)}; {_GET_AGAIN}")
