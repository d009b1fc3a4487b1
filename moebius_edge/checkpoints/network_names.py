"""The tensors of a network in a file of weights, whatever wraps them.

Training code saves the same weights in many wrappings: a dictionary inside a dictionary, names with the prefix of a
wrapper class, a moving average under names of its own. A note says what was unwrapped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BundleError
from .weights_file import shortened

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = dict[str, Tensor]

STUDENT, TEACHER = "student", "teacher"

_SHOWN = 3  # how many tensors a message names
_SAVE_AGAIN = "save module.state_dict() itself"
# Under which key a training checkpoint holds the network; the first that is there is taken.
_NESTED = ("state_dict", "model_state_dict", "model", "module", "network", "net", "student", "params", "ema", "average")
_MAX_DEPTH = 8
# Wrapper classes of PyTorch put these into the names of what they hold, at any place.
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_EMBEDDING = "embedding_layer.weight"  # of student and teacher


_STUDENT_NAME = re.compile(r"\.attn1\.pos_conv\.|\.attn2\.rel_pos_emb$")
_TEACHER_NAME = re.compile(r"\.attn1\.(gk_proj|g_proj|o_proj)\.")


def kind_of(names: Iterable[str]) -> str | None:
    """STUDENT or TEACHER where the tensors' ``names`` are such a network's, whatever is before them."""
    names = list(names)
    if any(_STUDENT_NAME.search(name) for name in names):
        return STUDENT
    return TEACHER if any(_TEACHER_NAME.search(name) for name in names) else None


def network_tensors(path: Path, content: Any, notes: list[str]) -> Tensors:
    """The flat dictionary of tensors in what a file holds; ``notes`` gets what was unwrapped.

    Raises BundleError where there is none.
    """
    keys = []
    for _ in range(_MAX_DEPTH):
        content = {k: v for k, v in content.items() if isinstance(k, str)} if isinstance(content, dict) else {}
        if isinstance(content.get("ema_buffers"), dict):
            content = _named_average(path, content)
            keys.append("ema_buffers")
        if {"network", "average", "recipe"} <= content.keys():
            raise BundleError(
                f"{path} is what `moebius-edge train --resume` goes on from",
                "give the student.safetensors or teacher.safetensors that the training wrote",
            )
        nested = [key for key in _NESTED if _holds_tensors(content.get(key))]
        if not nested:
            break
        keys.append(nested[0] + (f" (not {', '.join(nested[1:])})" if len(nested) > 1 else ""))
        content = content[nested[0]]
    tensors = {name: value for name, value in content.items() if _is_dense(value)}
    if not tensors:
        raise BundleError(f"{path} holds no dictionary of dense tensors", _SAVE_AGAIN)
    if other := [name for name in content if name not in tensors]:
        what = f"a {shortened(type(content[other[0]]).__name__)}"
        problem = f"{path} holds no flat dictionary of dense tensors: {some(other)} beside them, {what}"
        raise BundleError(problem, _SAVE_AGAIN)
    if keys:
        notes.append(f"{path.name}: the weights under {' / '.join(keys)} are taken")
    return tensors


def _is_dense(value: Any) -> bool:
    """Whether ``value`` is a tensor of real numbers that lies in memory as it is."""
    import torch

    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return False
    return not (value.is_meta or value.is_quantized or value.is_complex())


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, dict) or _is_dense(item) for item in value.values())


def _named_average(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The moving average of upstream's trainer: tensors under names without dots, and a table of their names."""
    table, buffers = content.get("ema_name_map"), content["ema_buffers"]
    if not isinstance(table, dict) or not all(isinstance(short, str) and short in buffers for short in table.values()):
        remedy = "save it again, or give the plain weights"
        raise BundleError(f"{path} is a moving average without its ema_name_map", remedy)
    return {name: buffers[short] for name, short in table.items()}


def refuse_other_network(path: Path, names: Iterable[str], wanted: str | None) -> None:
    """Raise BundleError for a teacher where a student is ``wanted``, and the other way round, by its tensors' names."""
    kind = kind_of(names)
    if (kind, wanted) == (TEACHER, STUDENT):
        remedy = "teachers are for `moebius-edge train --teacher FILE`, which makes a student"
        raise BundleError(f"{path} is a teacher (PixelHacker's network), and a student is wanted", remedy)
    if (kind, wanted) == (STUDENT, TEACHER):
        remedy = "`moebius-edge download teacher` fetches one"
        raise BundleError(f"{path} is a Moebius student, and a teacher is wanted", remedy)


def unwrap_names(path: Path, expected: Iterable[str], tensors: Tensors, notes: list[str]) -> Tensors:
    """``tensors`` under the names of a student or a teacher, whose names are ``expected``.

    Wrapper classes and a prefix are taken off the names, and tensors outside of that prefix are left out, with a note.
    Raises BundleError where two networks in the file would fit.
    """
    if all(name in tensors for name in expected):
        return tensors
    plain = {_WRAPPER.sub("", name): tensor for name, tensor in tensors.items()}
    prefixes = [n.removesuffix(_EMBEDDING) for n in plain if n == _EMBEDDING or n.endswith("." + _EMBEDDING)]
    if len(plain) < len(tensors) or len(prefixes) > 1:
        raise BundleError(f"{path} holds several networks", "save the one that is meant by itself")
    prefix = prefixes[0] if prefixes else ""
    inside = {n.removeprefix(prefix): tensor for n, tensor in plain.items() if n.startswith(prefix)}
    if inside.keys() != tensors.keys():
        left = len(tensors) - len(inside)
        beside = f", {left} tensors beside them are not used" if left else ""
        notes.append(f"{path.name}: prefixes are taken off the names of its tensors{beside}")
    return inside


def some(names: Iterable[str]) -> str:
    """How many ``names`` there are, and the first of them."""
    names = list(names)
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} ({', '.join(shortened(name, 160) for name in names[:_SHOWN])}{more})"
