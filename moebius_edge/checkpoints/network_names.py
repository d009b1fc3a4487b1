"""The tensors of a network found in a file of weights, whatever wraps them, and a file of another network named for
what it is.

Training code saves the same weights in many wrappings: a dictionary inside a dictionary, names with the prefix of a
wrapper class, a moving average under names of its own. What is unwrapped is said in a note.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import BundleError
from .inert_pickle import Opaque, StoredTensor
from .weights_file import shortened

STUDENT, TEACHER = "student", "teacher"
Tensors = dict[str, StoredTensor]

_SHOWN = 3  # how many tensors a message names
# Under which key a training checkpoint keeps the network; the first that is there is taken.
_NESTED = ("state_dict", "model_state_dict", "model", "module", "network", "net", "student", "params", "ema", "average")
_MAX_DEPTH = 8
# Wrapper classes of PyTorch put these into the names of what they hold, at any place.
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_EMBEDDING, _UNET = "embedding_layer.", "diff_model."
_STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")

_STUDENT_NAME = re.compile(r"\.attn1\.pos_conv\.|\.attn2\.rel_pos_emb$")
_TEACHER_NAME = re.compile(r"\.attn1\.(gk_proj|g_proj|o_proj)\.")
_LORA_NAME = re.compile(r"(^|[._])lora[._]|\.(hada|lokr)_w")
# What else is often given, by a name that only it has -> what it is, and what to do. The first that fits wins.
_OTHERS = (
    (
        re.compile(r"^(model\.)?diffusion_model\.|^input_blocks\."),
        "a Stable Diffusion checkpoint: Moebius is another network, `moebius-edge download places2` fetches it",
    ),
    (
        re.compile(r"\.transformer_blocks\.0\.attn1\.to_out\.|^up_blocks\.0\.resnets\.0\.conv1\.weight$"),
        "a Stable Diffusion U-Net: Moebius is another network, `moebius-edge download places2` fetches it",
    ),
    (
        re.compile(
            r"^(first_stage_model\.)?(post_)?quant_conv\.|^(first_stage_model\.)?decoder\.(conv_in|up_blocks|mid)\b"
        ),
        "an autoencoder (VAE): give its folder with --vae, and a student's weights in its place",
    ),
    (
        re.compile(r"(^|\.)text_model\.|token_embedding|(^|\.)wte\.|\.self_attn\.[qk]_proj\.|embed_tokens"),
        "a text encoder or a language model: give a Moebius student's weights",
    ),
)


def kind_of(names: Iterable[str]) -> str | None:
    """STUDENT or TEACHER where the tensors' ``names`` are such a network's, whatever stands before them."""
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
        if not isinstance(content, dict):
            break
        if isinstance(content.get("ema_buffers"), dict):
            content = _named_average(path, content)
            keys.append("ema_buffers")
        if {"network", "average", "recipe"} <= content.keys():
            raise BundleError(
                f"{path} is what `moebius-edge train --resume` goes on from: give the student.safetensors or "
                "teacher.safetensors that the training wrote"
            )
        nested = [key for key in _NESTED if _holds_tensors(content.get(key))]
        if not nested:
            break
        others = f" (not {', '.join(nested[1:])})" if len(nested) > 1 else ""
        keys.append(nested[0] + others)
        content = content[nested[0]]
    if not isinstance(content, dict) or not any(isinstance(value, StoredTensor) for value in content.values()):
        what = "no dictionary of tensors"
        if isinstance(content, dict) and (opaque := [v for v in content.values() if isinstance(v, Opaque)]):
            what = f"no dense tensors but {shortened(opaque[0].what)}"
        raise BundleError(f"{path} holds {what}: save module.state_dict() itself")
    other = [name for name, value in content.items() if not isinstance(value, StoredTensor)]
    if other:
        value = content[other[0]]
        what = value.what if isinstance(value, Opaque) else f"a {type(value).__name__}"
        raise BundleError(
            f"{path} holds no flat dictionary of tensors: {some(other)} beside them, {shortened(what)}: "
            "save module.state_dict() itself"
        )
    if keys:
        notes.append(f"{path.name}: the weights under {' / '.join(keys)} are taken")
    return content


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, (StoredTensor, dict)) for item in value.values())


def _named_average(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The moving average that upstream's trainer saves: tensors under names without dots, and a table of their
    names."""
    table, buffers = content.get("ema_name_map"), content["ema_buffers"]
    if not isinstance(table, dict) or not all(isinstance(short, str) and short in buffers for short in table.values()):
        raise BundleError(
            f"{path} is a moving average without its ema_name_map: save it again, or give the plain weights"
        )
    return {name: buffers[short] for name, short in table.items()}


def refuse_other_network(path: Path, names: Iterable[str], wanted: str | None) -> None:
    """Raise BundleError where the ``names`` of a file's tensors are those of a network that is not ``wanted``."""
    names = list(names)
    if (match := next((name for name in names if _LORA_NAME.search(name)), None)) is not None:
        raise BundleError(
            f"{path} is a LoRA, which changes a network and is none by itself (its tensor {shortened(match)} says so): "
            f"give the weights of a whole {wanted or 'network'}"
        )
    found = kind_of(names)
    if found == wanted and found is not None:
        return
    if found == TEACHER and wanted == STUDENT:
        raise BundleError(
            f"{path} is a teacher (PixelHacker's network), and a student is wanted: teachers are for "
            "`moebius-edge train --teacher FILE`, which makes a student"
        )
    if found == STUDENT and wanted == TEACHER:
        raise BundleError(
            f"{path} is a Moebius student, and a teacher is wanted: `moebius-edge download teacher` fetches one"
        )
    for pattern, what in _OTHERS if wanted is not None else ():
        if (match := next((name for name in names if pattern.search(name)), None)) is not None:
            raise BundleError(f"{path}, by its tensor {shortened(match)}, is {what}")


def unwrap_names(path: Path, expected: Iterable[str], tensors: Tensors, notes: list[str]) -> Tensors:
    """``tensors`` under the names of a student or a teacher, whose names are ``expected``; what is not found is left
    out.

    Tensors outside of the prefix under which the network lies are left out too, with a note. Raises BundleError where
    two networks in the file would fit.
    """
    expected = list(expected)
    if all(name in tensors for name in expected):
        return tensors
    plain = {_WRAPPER.sub("", name): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise BundleError(f"{path} holds the same network twice, wrapped and plain: save module.state_dict() itself")
    if plain.keys() != tensors.keys():
        wrapper = next(match[0] for match in map(_WRAPPER.search, tensors) if match)
        notes.append(f"{path.name}: {wrapper!r} is left out of the tensors' names")
    embedding = _prefix(path, plain, _EMBEDDING + "weight")
    unet = _prefix(
        path, plain, next((n for n in expected if n.startswith(_UNET + "conv_out.")), "").removeprefix(_UNET)
    )
    if unet is None or (embedding or "", unet) == ("", _UNET):
        return plain
    if embedding is None:
        raise BundleError(
            f"{path} holds the U-Net without the prompts' {_EMBEDDING}weight: save the state_dict() of the whole "
            "RemovalModel"
        )
    renamed = {}
    for name, tensor in plain.items():
        if name == embedding + _EMBEDDING + "weight":
            renamed[_EMBEDDING + "weight"] = tensor
        elif name.startswith(unet):
            renamed[_UNET + name.removeprefix(unet)] = tensor
    left = len(plain) - len(renamed)
    beside = f", {left} tensors beside them are not used" if left else ""
    notes.append(f"{path.name}: the tensors named {unet}* are taken as {_UNET}*{beside}")
    return renamed


def _prefix(path: Path, names: Iterable[str], end: str) -> str | None:
    """What stands before ``end`` in the one name that ends so."""
    found = [name.removesuffix(end) for name in names if name == end or name.endswith("." + end)]
    if len(found) > 1:
        under = ", ".join(shortened(prefix or "no prefix", 30) for prefix in found[:_SHOWN])
        raise BundleError(f"{path} holds several networks, under {under}: save the one that is meant by itself")
    return found[0] if found else None


def lacks_statistics(expected: Iterable[str], tensors: Tensors) -> bool:
    """Whether all that is missing in ``tensors`` are batch norms' statistics, as in an average over parameters."""
    missing = [name for name in expected if name not in tensors]
    return bool(missing) and all(name.endswith(_STATISTICS) for name in missing)


def some(names: Iterable[str]) -> str:
    """How many ``names`` there are, and the first of them."""
    names = list(names)
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} ({', '.join(shortened(name, 160) for name in names[:_SHOWN])}{more})"
