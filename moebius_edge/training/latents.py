"""Encoded training pictures: made by the autoencoder once into a folder, and read many times.

The autoencoder costs more than the denoiser's step, so every picture is encoded once, with and without its hole, and
used each time with other noise at another timestep. A folder holds ``index.json``, which says what the latents were
made from, and one numbered sub-folder for every ``shard_size`` pictures with three arrays, ``clean.npy``,
``masked.npy`` and ``mask.npy``. A shard is there whole or not at all, so an interrupted encoding goes on with the next.
"""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from typing_extensions import TypedDict

from ..data.samples import MaskedPictures
from ..documents import JsonObject, read_document
from ..errors import BundleError, MachineError, UsageError
from ..imaging.masks import latent_mask
from ..progress import Progress, no_progress
from ..system.files import atomic_directory
from ..system.fingerprint import first_difference
from .loop import atomic_save, draw_batches, lost_processes_named, make_folder, plain

INDEX = "index.json"
ARRAYS = ("clean", "masked", "mask")
UNREADABLE = "unreadable.txt"
CROP_COVERAGE = (0.05, 0.7)  # the share of the hole in a crop
_BATCH = 4  # pictures that go through the autoencoder at a time
_CROP_TRIES = 16


class Index(TypedDict):
    """``index.json``: what a folder's latents were made from."""

    format: Literal[1]
    parts: JsonObject


class Source(Protocol):
    """Where samples come from. ``draw`` is called in a loading process, ``latents`` on what it drew, stacked."""

    def draw(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Sample ``number``, from it and ``rng`` alone."""

    def latents(self, drawn: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Clean and masked latents (N, 4, h, w) and the mask (N, 1, h, w), float32."""


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}"


def read_index(folder: Path) -> Index:
    """What the latents in ``folder`` were made from. Raises MachineError if it is missing, BundleError if damaged."""
    index: Index = read_document(folder / INDEX, Index, BundleError, f"remove {folder}, and encode anew")
    return index


class LatentCache:
    """The folder that ``encode_latents`` wrote, left on the disk: P pictures with M masks each.

    ``read`` gives ``clean`` (4, h, w) of a picture and ``masked`` (4, h, w) of a picture and a mask, float16 and both
    scaled, and ``mask`` (h, w), uint8. It opens a file at every access, for thousands would not stay open at a time.
    A ``Source`` of random pictures with one of their masks, cut to ``side`` latent positions where that is given.

    Raises:
        MachineError: it is missing or may not be read. UsageError: its encoding has not come to its end, or the
            latents are smaller than ``side``. BundleError: it is damaged, or of another version.
    """

    def __init__(self, folder: Path, side: int | None = None) -> None:
        self.folder, self.side = folder, side
        parts = read_index(folder)["parts"]
        try:
            self._count, self._rows = (int(parts[name]) for name in ("count", "shard_size"))  # type: ignore[arg-type]
            shards = [_shard(folder, i) for i in range(-(-self._count // self._rows))]
            if missing := sum(not shard.is_dir() for shard in shards):
                problem = f"latents {folder} lack {missing} of {len(shards)} shards"
                raise UsageError(problem, "encode on with the same command as before")
            for number, shard in enumerate(shards):
                rows = min(self._rows, self._count - number * self._rows)
                shapes = {name: np.load(shard / f"{name}.npy", mmap_mode="r").shape for name in ARRAYS}
                if any(shape[0] != rows for shape in shapes.values()):
                    raise ValueError(f"{shard} has arrays of {shapes}, not of {rows} pictures")
            self.masks, height, width = shapes["mask"][1:]
        except PermissionError as error:
            raise MachineError(f"no right to read {error.filename}: run `chmod u+r {error.filename}`") from None
        except (OSError, EOFError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
            remedy = f"remove {folder}, and the same command encodes anew"
            raise BundleError(f"latents {folder} are damaged ({' '.join(str(error).split())}): {remedy}") from error
        if side is not None and not 0 < side <= min(height, width):
            raise UsageError(f"a crop of {side} does not fit into latents of {width}x{height}: encode larger pictures")

    def read(self, name: str, picture: int, *place: int) -> np.ndarray:
        """Of ``clean`` those of a picture, of ``masked`` and ``mask`` those of a picture and the number of its mask."""
        number, row = divmod(picture, self._rows)
        return np.array(np.load(_shard(self.folder, number) / f"{name}.npy", mmap_mode="r")[row][place])

    def __len__(self) -> int:
        """Pictures, each with ``self.masks`` masks."""
        return self._count

    def draw(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """A random picture with one of its masks: clean (4, h, w), masked (4, h, w), mask (1, h, w), float32.

        With ``side``, a random square is cut over some place of the hole, so that the hole covers 5 to 70 percent of
        it; where no try does, the one that comes nearest.
        """
        i, j = int(rng.integers(len(self))), int(rng.integers(self.masks))
        mask = self.read("mask", i, j)
        y, x = np.s_[:, :] if self.side is None else _crop(rng, mask, self.side)
        clean, masked = self.read("clean", i)[:, y, x], self.read("masked", i, j)[:, y, x]
        return clean.astype(np.float32), masked.astype(np.float32), mask[y, x][None].astype(np.float32)

    def latents(self, drawn: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """What was drawn, for it is encoded already."""
        clean, masked, mask = drawn
        return clean, masked, mask


def _crop(rng: np.random.Generator, mask: np.ndarray, size: int) -> tuple[slice, slice]:
    """The rows and columns of a random square of ``size`` positions over the hole, see ``LatentCache.draw``."""
    hole = np.argwhere(mask if mask.any() else mask == 0)  # where there is no hole to look for: anywhere
    least, best = np.inf, (slice(0, size), slice(0, size))
    for _ in range(_CROP_TRIES):
        places = zip(hole[int(rng.integers(len(hole)))].tolist(), mask.shape, strict=True)
        y, x = (int(rng.integers(max(0, place - size + 1), min(place, n - size) + 1)) for place, n in places)
        window = np.s_[y : y + size, x : x + size]
        share = float(np.mean(mask[window] != 0))
        miss = max(CROP_COVERAGE[0] - share, share - CROP_COVERAGE[1], 0.0)
        if miss < least:
            least, best = miss, window
        if miss == 0:
            break
    return best


class EncodedPictures:
    """A ``latents.Source`` of pictures with a new crop and mask every time, encoded by ``vae`` as they are drawn."""

    def __init__(self, vae: AutoencoderKL, pictures: MaskedPictures) -> None:
        self._vae, self.pictures = vae, pictures

    def draw(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """uint8 RGB (S, S, 3) and bool (1, S, S)."""
        return self.pictures.sample_masks(number, 1)

    def latents(self, drawn: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """See ``encode_batch``."""
        clean, masked, mask = encode_batch(self._vae, *(part.cpu().numpy() for part in drawn))
        return clean, masked[:, 0], mask


@torch.no_grad()
def encode_batch(vae: AutoencoderKL, images: np.ndarray, masks: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """What a denoiser learns from, encoded on the VAE's device in bfloat16, given in float32.

    Args:
        images: uint8 RGB (N, S, S, 3), S a multiple of 8.
        masks: bool (N, M, S, S), True where to fill.

    Returns:
        clean (N, 4, h, w): the posterior's mean, scaled; masked (N, M, 4, h, w): the same of the picture with its hole
        mid-grey; mask (N, M, h, w): 1 where to fill, of ``masks.latent_mask``.
    """
    device = next(vae.parameters()).device
    pictures = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    known = torch.from_numpy(~masks).to(device)
    clean = _encode(vae, pictures)
    masked = [_encode(vae, pictures * known[:, m : m + 1]) for m in range(masks.shape[1])]
    cells = [[latent_mask(mask, clean.shape[-1]) for mask in of_picture] for of_picture in masks]
    return clean, torch.stack(masked, 1), torch.from_numpy(np.array(cells)).to(device).float()


def _encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images (N, 3, S, S) in [-1, 1] to scaled latents (N, 4, h, w), float32."""
    with torch.autocast(images.device.type, torch.bfloat16):
        mean: Tensor = vae.encode(images).latent_dist.mean
    return mean.float() * vae.config["scaling_factor"]


def encode_latents(
    vae: AutoencoderKL,
    samples: MaskedPictures,
    folder: Path,
    count: int,
    masks_per_picture: int = 1,
    shard_size: int = 256,
    workers: int = 1,
    progress: Progress = no_progress,
) -> LatentCache:
    """Encode samples 0 to ``count`` - 1 into ``folder``, or what of them is missing there, and open it.

    One shard is held in memory at a time; ``workers`` processes draw the samples. Pictures that cannot be read are
    listed in ``folder/unreadable.txt``.

    Raises:
        UsageError: the folder holds latents of another VAE, other samples or settings, or something else; or no
            picture can be read. BundleError: latents are not finite, or what is there is damaged.
        MachineError: no right to write, or the disk is full.
    """
    settings = {"count": count, "masks_per_picture": masks_per_picture, "shard_size": shard_size}
    _check_folder(folder, plain({"vae": vae_hash(vae), "samples": samples.identity(), **settings}))
    batches: dict[Path, list[range]] = {}
    for start in range(0, count, shard_size):
        shard, end = _shard(folder, start // shard_size), min(count, start + shard_size)
        if not shard.is_dir():
            batches[shard] = [range(k, min(k + _BATCH, end)) for k in range(start, end, _BATCH)]
    missing = [batch for of_shard in batches.values() for batch in of_shard]
    done = count - sum(map(len, missing))

    def draw(number: int) -> tuple[np.ndarray, np.ndarray]:
        return samples.sample_masks(number, masks_per_picture)

    with lost_processes_named(), closing(draw_batches(draw, missing, workers)) as drawn:
        for shard, of_shard in batches.items():
            encoded = []
            for _ in of_shard:
                images, masks = next(drawn)
                encoded.append(_stored(*encode_batch(vae, images, masks)))
                done += len(images)
                progress("encoding pictures", done, count)
            with atomic_directory(shard) as temporary:
                for name, column in zip(ARRAYS, zip(*encoded, strict=True), strict=True):
                    buffer = io.BytesIO()  # numpy itself reports a full disk without saying that it is one
                    np.save(buffer, np.concatenate(column))
                    (temporary / f"{name}.npy").write_bytes(buffer.getbuffer())
            samples.unreadable.write(folder / UNREADABLE)
    return LatentCache(folder)


def vae_hash(vae: AutoencoderKL) -> str:
    """SHA-256 of the VAE's weights and of its configuration, without the notes on where it came from."""
    settings = {k: v for k, v in vae.config.items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _stored(clean: Tensor, masked: Tensor, mask: Tensor) -> tuple[np.ndarray, ...]:
    """The arrays as a shard has them. Raises BundleError for latents that are not finite."""
    latents = [latent.half().cpu().numpy() for latent in (clean, masked)]
    if not all(np.isfinite(latent).all() for latent in latents):
        raise BundleError("the VAE gives latents that are not finite in float16: its weights are damaged, or no VAE's")
    return *latents, mask.byte().cpu().numpy()


def _check_folder(folder: Path, parts: dict[str, Any]) -> None:
    """Note in the folder's index what its latents are made from, or check that they are made from the same."""
    make_folder(folder)
    if not (folder / INDEX).exists():
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise UsageError(f"{folder} is not empty and holds no {INDEX}: name a new folder for latents")
        atomic_save({"format": 1, "parts": parts}, folder / INDEX)
    elif (there := read_index(folder)["parts"]) != parts:
        difference = first_difference(there, parts)
        raise UsageError(f"{folder} holds other latents ({difference}): name a new folder, or remove this one")
