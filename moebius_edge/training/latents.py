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
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from typing_extensions import TypedDict

from ..data.samples import MaskedPictures
from ..documents import JsonObject, Sha256, read_document
from ..errors import BundleError, MachineError, UsageError
from ..imaging.masks import latent_mask
from ..progress import Progress, no_progress
from ..system.files import atomic_directory
from ..system.fingerprint import fingerprint, first_difference
from .loop import atomic_save, draw_batches, lost_processes_named, make_folder, plain

INDEX = "index.json"
ARRAYS = ("clean", "masked", "mask")
CROP_COVERAGE = (0.05, 0.7)  # the share of the hole in a crop
_CROP_TRIES = 16


class Index(TypedDict):
    """``index.json``: what a folder's latents were made from."""

    format: Literal[1]
    key: Sha256
    parts: JsonObject


class Source(Protocol):
    """Where samples come from. ``draw`` is called in a loading process, ``latents`` on what it drew, stacked."""

    def draw(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Sample ``number``, from it and ``rng`` alone."""

    def latents(self, drawn: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Clean and masked latents (N, 4, h, w) and the mask (N, 1, h, w), float32."""


def shard_name(number: int) -> str:
    return f"{number:06d}"


def read_index(folder: Path) -> Index:
    """What the latents in ``folder`` were made from. Raises MachineError if it is missing, BundleError if damaged."""
    index: Index = read_document(folder / INDEX, Index, BundleError, f"remove {folder}, and encode anew")
    return index


class Rows:
    """An array over several ``.npy`` files, ``rows`` rows in each but the last; ``array[i]`` and ``array[i, j]`` work.

    Every access opens its file and reads what was asked for, so that thousands of files need no thousands of
    descriptors. Raises ValueError or OSError for a file that is missing, no array, or not as long as it should be.
    """

    def __init__(self, files: Sequence[Path], rows: int, count: int) -> None:
        self.files, self.rows = files, rows
        for number, file in enumerate(files):
            array = np.load(file, mmap_mode="r")
            if len(array) != (expected := min(rows, count - number * rows)):
                raise ValueError(f"{file} has {len(array)} rows, not {expected}")
            self.shape = (count, *array.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, place: int | tuple[int, ...]) -> np.ndarray:
        first, *others = place if isinstance(place, tuple) else (place,)
        if not 0 <= first < len(self):
            raise IndexError(f"{place} lies outside of {self.shape}")
        number, row = divmod(first, self.rows)
        array: np.ndarray = np.load(self.files[number], mmap_mode="r")
        return np.array(array[row][tuple(others)])


@dataclass(frozen=True)
class LatentCache:
    """``clean`` (P, 4, h, w), ``masked`` (P, M, 4, h, w) float16, both scaled; ``mask`` (P, M, h, w) uint8.

    A ``Source`` of random pictures with one of their masks, cut to ``side`` latent positions where that is given.
    """

    clean: np.ndarray | Rows
    masked: np.ndarray | Rows
    mask: np.ndarray | Rows
    side: int | None = None

    @classmethod
    def open(cls, folder: Path, side: int | None = None) -> LatentCache:
        """The folder that ``encode_latents`` wrote, left on the disk.

        Raises:
            MachineError: it is missing or may not be read. UsageError: its encoding has not come to its end, or the
                latents are smaller than ``side``. BundleError: it is damaged, or of another version.
        """
        parts = read_index(folder)["parts"]
        try:
            count, rows = (int(parts[name]) for name in ("count", "shard_size"))  # type: ignore[arg-type]
            shards = [folder / shard_name(i) for i in range(-(-count // rows))]
            if missing := sum(not shard.is_dir() for shard in shards):
                lacking = f"latents {folder} lack {missing} of {len(shards)} shards"
                raise UsageError(f"{lacking}: encode on with the same command as before")
            arrays = {name: Rows([shard / f"{name}.npy" for shard in shards], rows, count) for name in ARRAYS}
            cache = cls(**arrays, side=side)
            height, width = cache.mask.shape[2:]
        except PermissionError as error:
            raise MachineError(f"no right to read {error.filename}: run `chmod u+r {error.filename}`") from None
        except (OSError, EOFError, ValueError, KeyError, TypeError, ArithmeticError, AttributeError) as error:
            _damaged(folder, error)
        if side is not None and not 0 < side <= min(height, width):
            raise UsageError(f"a crop of {side} does not fit into latents of {width}x{height}: encode larger pictures")
        return cache

    def __len__(self) -> int:
        """Pictures, each with ``self.mask.shape[1]`` masks."""
        return len(self.clean)

    def draw(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """A random picture with one of its masks: clean (4, h, w), masked (4, h, w), mask (1, h, w), float32.

        With ``side``, a random square is cut over some place of the hole, so that the hole covers 5 to 70 percent of
        it; where no try does, the one that comes nearest.
        """
        i, j = int(rng.integers(len(self.clean))), int(rng.integers(self.mask.shape[1]))
        mask = self.mask[i, j]
        y, x = np.s_[:, :] if self.side is None else _crop(rng, mask, self.side)
        clean, masked = self.clean[i][:, y, x], self.masked[i, j][:, y, x]
        return clean.astype(np.float32), masked.astype(np.float32), mask[y, x][None].astype(np.float32)

    def latents(self, drawn: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """What was drawn, for it is encoded already."""
        clean, masked, mask = drawn
        return clean, masked, mask


def _damaged(folder: Path, error: Exception) -> NoReturn:
    remedy = f"remove {folder}, and the same command encodes anew"
    raise BundleError(f"latents {folder} are damaged ({' '.join(str(error).split())}): {remedy}") from error


def _crop(rng: np.random.Generator, mask: np.ndarray, size: int) -> tuple[slice, slice]:
    """The rows and columns of a random square of ``size`` positions over the hole, see ``LatentCache.draw``."""
    hole = np.argwhere(mask)
    if not len(hole):
        hole = np.argwhere(mask == 0)  # there is no hole to look for: anywhere
    best: tuple[float, tuple[slice, slice]] | None = None
    for _ in range(_CROP_TRIES):
        places = zip(hole[int(rng.integers(len(hole)))].tolist(), mask.shape, strict=True)
        y, x = (int(rng.integers(max(0, place - size + 1), min(place, n - size) + 1)) for place, n in places)
        window = np.s_[y : y + size, x : x + size]
        share = float(np.mean(mask[window] != 0))
        miss = max(CROP_COVERAGE[0] - share, share - CROP_COVERAGE[1], 0.0)
        if best is None or miss < best[0]:
            best = miss, window
        if miss == 0:
            break
    assert best is not None
    return best[1]


UNREADABLE = "unreadable.txt"
_BATCH = 4  # pictures that go through the autoencoder at a time


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
    missing = [i for i in range(-(-count // shard_size)) if not (folder / shard_name(i)).is_dir()]
    shards = {i: range(i * shard_size, min(count, (i + 1) * shard_size)) for i in missing}
    batches = {i: [of[k : k + _BATCH] for k in range(0, len(of), _BATCH)] for i, of in shards.items()}
    numbers = [batch for of_shard in batches.values() for batch in of_shard]
    done = count - sum(map(len, numbers))

    def draw(number: int) -> tuple[np.ndarray, np.ndarray]:
        return samples.sample_masks(number, masks_per_picture)

    with lost_processes_named(), closing(draw_batches(draw, numbers, workers)) as drawn:
        for shard in missing:
            columns: tuple[list[np.ndarray], ...] = ([], [], [])
            for _ in batches[shard]:
                images, masks = next(drawn)
                for column, encoded in zip(columns, _stored(*encode_batch(vae, images, masks)), strict=True):
                    column.append(encoded)
                done += len(images)
                progress("encoding pictures", done, count)
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


def _stored(clean: Tensor, masked: Tensor, mask: Tensor) -> tuple[np.ndarray, ...]:
    """The arrays as a shard has them. Raises BundleError for latents that are not finite."""
    latents = [latent.half().cpu().numpy() for latent in (clean, masked)]
    if not all(np.isfinite(latent).all() for latent in latents):
        raise BundleError("the VAE gives latents that are not finite in float16: its weights are damaged, or no VAE's")
    return *latents, mask.byte().cpu().numpy()


def _write_shard(folder: Path, columns: Sequence[np.ndarray]) -> None:
    with atomic_directory(folder) as temporary:
        for name, column in zip(ARRAYS, columns, strict=True):
            buffer = io.BytesIO()  # numpy itself reports a full disk without saying that it is one
            np.save(buffer, column)
            (temporary / f"{name}.npy").write_bytes(buffer.getbuffer())


def _check_folder(folder: Path, parts: dict[str, Any]) -> None:
    """Note in the folder's index what its latents are made from, or check that they are made from the same."""
    make_folder(folder)
    if not (folder / INDEX).exists():
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise UsageError(f"{folder} is not empty and holds no {INDEX}: name a new folder for latents")
        atomic_save({"format": 1, "key": fingerprint(parts), "parts": parts}, folder / INDEX)
    elif (there := read_index(folder)["parts"]) != parts:
        difference = first_difference(there, parts)
        raise UsageError(f"{folder} holds other latents ({difference}): name a new folder, or remove this one")
