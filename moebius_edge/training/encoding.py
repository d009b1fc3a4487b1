"""Encodes training pictures by the autoencoder: a batch on the way, or all of them once into a folder.

The folder holds ``index.json``, which says what the latents were made from, and one numbered sub-folder for every
``shard_size`` pictures with three arrays, ``clean.npy``, ``masked.npy`` and ``mask.npy`` (shapes: see
``latents.LatentCache``). A shard is there whole or not at all, so an interrupted encoding goes on with the next.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from ..data.samples import Samples
from ..errors import BundleError, UsageError
from ..imaging.masks import latent_mask
from ..system.files import atomic_directory
from .latents import ARRAYS, FORMAT, INDEX, LatentCache, shard_name
from .loop import NumberedLoader, atomic_save, make_folder, plain, progress_bar

UNREADABLE = "unreadable.txt"


@torch.no_grad()
def encode_batch(
    vae: AutoencoderKL, images: np.ndarray, masks: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a denoiser learns from, encoded on the VAE's device in bfloat16, given in float32.

    Args:
        images: uint8 RGB (N, S, S, 3), S a multiple of 8.
        masks: bool (N, S, S), True where to fill.

    Returns:
        clean (N, 4, h, w): the posterior's mean, scaled; masked (N, 4, h, w): the same of the picture with its hole
        mid-grey; mask (N, 1, h, w): 1 where to fill, of ``masks.latent_mask``.
    """
    pictures = _to_device(vae, images)
    return _encode(vae, pictures), *_encode_masked(vae, pictures, masks)


def encode_latents(
    vae: AutoencoderKL,
    samples: Samples,
    folder: Path,
    count: int,
    masks_per_picture: int = 1,
    batch: int = 4,
    shard_size: int = 256,
    workers: int = 1,
) -> LatentCache:
    """Encodes samples 0 to ``count`` - 1 into ``folder``, or what of them is missing there, and opens it.

    One shard is held in memory at a time; ``workers`` processes draw the samples. Pictures that cannot be read are
    listed in ``folder/unreadable.txt``.

    Raises:
        UsageError: the folder holds latents of another VAE, other samples or settings, or something else; or no
            picture can be read. BundleError: latents are not finite, or what is there is damaged.
        MachineError: no right to write, or the disk is full.
    """
    for name, value in (("count", count), ("masks_per_picture", masks_per_picture)):
        if value < 1:
            raise UsageError(f"{name} is {value}: give 1 or more")
    settings = {"count": count, "masks_per_picture": masks_per_picture, "shard_size": shard_size}
    _claim(folder, plain({"vae": vae_hash(vae), "samples": samples.identity(), **settings}))
    missing = [i for i in range(-(-count // shard_size)) if not (folder / shard_name(i)).is_dir()]
    numbers = [range(i * shard_size, min(count, (i + 1) * shard_size)) for i in missing]
    todo = sum(map(len, numbers))
    if todo == 0:
        return LatentCache.open(folder)

    def draw(place: int) -> tuple[np.ndarray, np.ndarray]:
        shard, row = divmod(place, shard_size)  # all but the last are full
        of_shard = numbers[shard % len(numbers)]  # the process draws ahead, beyond the end
        return samples.sample_masks(of_shard[row % len(of_shard)], masks_per_picture)

    started, done = time.monotonic(), count - todo
    with progress_bar("encoding", count) as report, closing(iter(NumberedLoader(draw, 1, workers=workers))) as drawn:
        for shard, of_shard in zip(missing, numbers, strict=True):
            columns: tuple[list[np.ndarray], ...] = ([], [], [])
            for images, masks in _batches(islice(drawn, len(of_shard)), batch):
                for column, encoded in zip(columns, _encode_columns(vae, images, masks), strict=True):
                    column.append(encoded)
                done += len(images)
                rate = (done - count + todo) / (time.monotonic() - started)
                if done % 50 < len(images) or done == count:
                    report(done, {"pictures": done, "per_s": rate, "unreadable": len(samples.unreadable)})
            _write_shard(folder / shard_name(shard), [np.concatenate(column) for column in columns])
            samples.unreadable.write(folder / UNREADABLE)
    return LatentCache.open(folder)


def vae_hash(vae: AutoencoderKL) -> str:
    """SHA-256 of the VAE's weights and of its configuration but for notes on where it came from."""
    settings = {k: v for k, v in vae.config.items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _to_device(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    """uint8 (N, S, S, 3) to float32 (N, 3, S, S) in [-1, 1]; bytes travel, a quarter as many."""
    pictures = torch.from_numpy(images).to(next(vae.parameters()).device)
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def _encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, S, S) in [-1, 1] to scaled latents (N, 4, h, w), float32."""
    with torch.autocast(images.device.type, torch.bfloat16):
        mean: torch.Tensor = vae.encode(images).latent_dist.mean
    return mean.float() * vae.config["scaling_factor"]


def _encode_masked(vae: AutoencoderKL, pictures: torch.Tensor, masks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (N, 3, S, S), masks (N, S, S): masked (N, 4, h, w) and mask (N, 1, h, w)."""
    known = torch.from_numpy(~masks[:, None]).to(pictures.device)
    masked = _encode(vae, pictures * known)
    cells = np.stack([latent_mask(mask, masked.shape[-1]) for mask in masks])
    return masked, torch.from_numpy(cells[:, None]).to(pictures.device).float()


@torch.no_grad()
def _encode_columns(vae: AutoencoderKL, images: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, ...]:
    """Images (N, S, S, 3), masks (N, M, S, S): the three arrays of a shard, a row a picture.

    Raises BundleError for latents that are not finite.
    """
    pictures = _to_device(vae, images)
    clean = _encode(vae, pictures)
    pairs = [_encode_masked(vae, pictures, masks[:, m]) for m in range(masks.shape[1])]
    masked, mask = torch.stack([m for m, _ in pairs], 1), torch.cat([m for _, m in pairs], 1)
    latents = [latent.half().cpu().numpy() for latent in (clean, masked)]
    if not all(np.isfinite(latent).all() for latent in latents):
        raise BundleError("the VAE gives latents that are not finite in float16: its weights are damaged, or no VAE's")
    return *latents, mask.byte().cpu().numpy()


def _batches(drawn: Iterator[tuple[np.ndarray, np.ndarray]], batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    while rows := list(islice(drawn, batch)):
        images, masks = zip(*rows, strict=True)
        yield np.concatenate(images), np.concatenate(masks)


def _write_shard(folder: Path, columns: Sequence[np.ndarray]) -> None:
    with atomic_directory(folder) as temporary:
        for name, column in zip(ARRAYS, columns, strict=True):
            buffer = io.BytesIO()  # numpy itself reports a full disk without saying that it is one
            np.save(buffer, column)
            (temporary / f"{name}.npy").write_bytes(buffer.getbuffer())


def _claim(folder: Path, parts: dict[str, Any]) -> None:
    """Notes in the folder's index what its latents are made from, or sees that it is the same."""
    path = folder / INDEX
    make_folder(folder)
    try:
        index = json.loads(path.read_text())
        theirs = dict(index["parts"])
    except FileNotFoundError:
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise UsageError(f"{folder} is not empty and holds no {INDEX}: name a new folder for latents") from None
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        atomic_save({"format": FORMAT, "key": key, "parts": parts}, path)
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} cannot be read ({error}): remove the folder, or name a new one") from error
    if index.get("format") != FORMAT:
        raise UsageError(f"{folder} holds latents of format {index.get('format')}, not {FORMAT}: name a new folder")
    if theirs != parts:
        what = "; ".join(_differences(theirs, parts))
        raise UsageError(f"{folder} holds latents made otherwise ({what}): name a new folder, or remove this one")


def _differences(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """ "transform.flip was true, is now false" for every value, by its path; hashes are only said to differ."""
    for name in sorted(theirs.keys() | ours.keys()):
        old, new, where = theirs.get(name), ours.get(name), prefix + name
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{where}.")
        elif old != new and isinstance(old, str) and isinstance(new, str) and len(old) == len(new) == 64:
            yield f"{where} differs"
        elif old != new:
            yield f"{where} was {json.dumps(old)}, is now {json.dumps(new)}"
