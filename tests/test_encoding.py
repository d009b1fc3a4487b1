"""Latents of batches and of whole folders: what is encoded, what a cache is kept by, encodings cut short."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from moebius_edge.data.unreadable import Unreadable
from moebius_edge.errors import BundleError, MachineError, UsageError
from moebius_edge.imaging.masks import latent_mask
from moebius_edge.training import encoding
from moebius_edge.training.autoencoder import AutoencoderRecipe, build_autoencoder
from moebius_edge.training.encoding import encode_batch, encode_latents, vae_hash
from moebius_edge.training.latents import ARRAYS, LatentCache

torch.set_num_threads(1)
SIZE = 32


class Stop(Exception):
    """Raised by a test in the middle of an encoding."""


class Drawn:
    """Noise with boxes as masks; every third picture passes over one that cannot be read."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.unreadable = seed, Unreadable()

    def sample_masks(self, index: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        if index % 3 == 0:
            self.unreadable.add(f"{index}.png", "damaged")
        rng = np.random.default_rng([self.seed, index])
        masks = np.zeros((count, SIZE, SIZE), bool)
        for mask in masks:
            y, x = rng.integers(0, SIZE - 12, 2)
            mask[y : y + 12, x : x + 12] = True
        return rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8), masks

    def identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "transform": {"size": SIZE}}


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    model = build_autoencoder(AutoencoderRecipe(block_out_channels=(8, 8, 8, 8), norm_num_groups=4)).eval()
    model.register_to_config(scaling_factor=2.0)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def expected_latents(vae: AutoencoderKL, image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        tensor = torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32))
        return (2 * vae.encode(tensor).latent_dist.mean[0]).numpy()


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() < 0.05 * np.abs(b).max())  # bfloat16


def test_a_batch_is_encoded_with_and_without_its_holes(vae: AutoencoderKL) -> None:
    images, masks = zip(*(Drawn().sample_masks(i, 1) for i in range(3)), strict=True)
    clean, masked, mask = encode_batch(vae, np.stack(images), np.concatenate(masks))
    assert (clean.shape, masked.shape, mask.shape) == ((3, 4, 4, 4), (3, 4, 4, 4), (3, 1, 4, 4))
    assert {t.dtype for t in (clean, masked, mask)} == {torch.float32} and not clean.requires_grad
    for i in range(3):
        scaled = images[i] / 127.5 - 1
        assert close(clean[i].numpy(), expected_latents(vae, scaled))
        grey = np.where(masks[i][0][..., None], 0.0, scaled)
        assert close(masked[i].numpy(), expected_latents(vae, grey))
        assert not close(masked[i].numpy(), clean[i].numpy())
        np.testing.assert_array_equal(mask[i, 0].numpy() > 0, latent_mask(masks[i][0], 4))


def test_a_folder_holds_what_batches_would_give(vae: AutoencoderKL, tmp_path: Path) -> None:
    cache = encode_latents(vae, Drawn(), tmp_path / "new" / "run", 7, 2, batch=2, shard_size=3)
    assert (cache.clean.shape, cache.masked.shape, cache.mask.shape) == ((7, 4, 4, 4), (7, 2, 4, 4, 4), (7, 2, 4, 4))
    assert sorted(p.name for p in (tmp_path / "new" / "run").iterdir()) == [
        "000000", "000001", "000002", "index.json", "unreadable.txt",
    ]  # fmt: skip
    for i in range(7):
        image, masks = Drawn().sample_masks(i, 2)
        for j in range(2):
            clean, masked, mask = encode_batch(vae, image[None], masks[j : j + 1])
            assert close(cache.clean[i], clean[0].numpy()) and close(cache.masked[i, j], masked[0].numpy())
            np.testing.assert_array_equal(cache.mask[i, j], mask[0, 0].numpy())
    assert cache.clean[0].dtype == np.float16 and cache.mask[0].dtype == np.uint8
    lines = (tmp_path / "new" / "run" / "unreadable.txt").read_text().splitlines()
    assert lines[:3] == ["0.png\tdamaged", "3.png\tdamaged", "6.png\tdamaged"]  # drawn ahead, there may be more


@pytest.mark.parametrize("written", [0, 1, 2])
def test_an_encoding_cut_short_goes_on_to_the_same_result(
    vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    encode_latents(vae, Drawn(), tmp_path / "whole", 8, shard_size=3, batch=2)
    write = encoding._write_shard

    def stopping(folder: Path, columns: Any) -> None:
        if int(folder.name) == written:
            raise Stop
        write(folder, columns)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(encoding, "_write_shard", stopping)
        encode_latents(vae, Drawn(), tmp_path / "cut", 8, shard_size=3, batch=2)
    left = contents(tmp_path / "cut")
    assert sum(name.endswith("clean.npy") for name in left) == written
    with pytest.raises(UsageError, match=rf"cut have {written} of 3 shards: encode on with the same command"):
        LatentCache.open(tmp_path / "cut")
    encode_latents(vae, Drawn(), tmp_path / "cut", 8, shard_size=3, batch=2)
    whole, again = (contents(tmp_path / name) for name in ("whole", "cut"))
    for found in (whole, again):
        del found["unreadable.txt"]
    assert again == whole


def test_a_shard_that_was_lost_is_made_again_and_no_other(
    vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_latents(vae, Drawn(), tmp_path, 8, shard_size=3)
    before = contents(tmp_path)
    for name in ARRAYS:
        (tmp_path / "000001" / f"{name}.npy").unlink()
    (tmp_path / "000001").rmdir()
    drawn: list[int] = []
    encode = encoding._encode_columns
    monkeypatch.setattr(encoding, "_encode_columns", lambda *given: drawn.append(len(given[1])) or encode(*given))
    encode_latents(vae, Drawn(), tmp_path, 8, shard_size=3)
    assert sum(drawn) == 3 and contents(tmp_path) == before
    encode_latents(vae, Drawn(), tmp_path, 8, shard_size=3)
    assert sum(drawn) == 3


def test_a_cache_of_anything_else_is_refused_with_what_differs(vae: AutoencoderKL, tmp_path: Path) -> None:
    encode_latents(vae, Drawn(), tmp_path, 2)
    torch.manual_seed(1)
    other = build_autoencoder(AutoencoderRecipe(block_out_channels=(8, 8, 8, 8), norm_num_groups=4)).eval()
    other.register_to_config(scaling_factor=2.0)

    class Larger(Drawn):
        def identity(self) -> dict[str, Any]:
            return {"seed": self.seed, "transform": {"size": 64}}

    cases: dict[str, tuple[Any, ...]] = {
        r"\(vae differs\)": (other, Drawn(), tmp_path, 2),
        r"\(samples.seed was 0, is now 5\)": (vae, Drawn(5), tmp_path, 2),
        r"\(samples.transform.size was 32, is now 64\)": (vae, Larger(), tmp_path, 2),
        r"\(count was 2, is now 3; masks_per_picture was 1, is now 2\)": (vae, Drawn(), tmp_path, 3, 2),
    }
    before = contents(tmp_path)
    for message, given in cases.items():
        with pytest.raises(UsageError, match=rf"holds latents made otherwise {message}: name a new folder, or remove"):
            encode_latents(*given)
    assert contents(tmp_path) == before


def test_the_hash_of_a_vae_is_of_its_weights_and_settings(vae: AutoencoderKL) -> None:
    def build(seed: int = 0, scale: float = 2.0) -> AutoencoderKL:
        torch.manual_seed(seed)
        model = build_autoencoder(AutoencoderRecipe(block_out_channels=(8, 8, 8, 8), norm_num_groups=4))
        model.register_to_config(scaling_factor=scale)
        return model

    ours = vae_hash(vae)
    named = build()
    named.register_to_config(_name_or_path="elsewhere")
    assert vae_hash(named) == ours
    nudged = build()
    with torch.no_grad():
        list(nudged.parameters())[-1][0] += 1e-6
    assert len({ours, vae_hash(build(1)), vae_hash(build(scale=3.0)), vae_hash(nudged), vae_hash(build().half())}) == 5
    assert len(vae_hash(build().bfloat16())) == 64


def test_folders_of_other_things_are_left_alone(vae: AutoencoderKL, tmp_path: Path) -> None:
    (tmp_path / "000000").mkdir()
    with pytest.raises(UsageError, match=r"is not empty and holds no index.json: name a new folder for latents"):
        encode_latents(vae, Drawn(), tmp_path, 2)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(BundleError, match=r"index.json cannot be read .*: remove the folder, or name a new one"):
        encode_latents(vae, Drawn(), tmp_path, 2)
    (tmp_path / "index.json").write_text(json.dumps({"format": 9, "parts": {}}))
    with pytest.raises(UsageError, match=r"holds latents of format 9, not 1: name a new folder"):
        encode_latents(vae, Drawn(), tmp_path, 2)
    with pytest.raises(UsageError, match=r"index.json is, or lies in, a file: name a folder"):
        encode_latents(vae, Drawn(), tmp_path / "index.json", 2)
    for counts, message in (((0, 1), "count is 0: give 1 or more"), ((1, 0), "masks_per_picture is 0: give 1")):
        with pytest.raises(UsageError, match=message):
            encode_latents(vae, Drawn(), tmp_path / "new", *counts)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_whole_shards_only(
    vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = Path.write_bytes, 0

    def full(path: Path, data: bytes) -> int:
        nonlocal calls
        calls += path.suffix == ".npy"
        if calls == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(MachineError, match=r"cannot write .*000001: the disk is full: free space in"):
        encode_latents(vae, Drawn(), tmp_path, 4, shard_size=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000", "index.json", "unreadable.txt"]


def test_latents_that_are_not_finite_are_not_written(vae: AutoencoderKL, tmp_path: Path) -> None:
    broken = build_autoencoder(AutoencoderRecipe(block_out_channels=(8, 8, 8, 8), norm_num_groups=4)).eval()
    broken.register_to_config(scaling_factor=1e9)
    with pytest.raises(BundleError, match=r"latents that are not finite in float16: its weights are damaged"):
        encode_latents(broken, Drawn(), tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["index.json"]


def test_an_error_of_the_source_arrives_as_it_is(vae: AutoencoderKL, tmp_path: Path) -> None:
    class Empty(Drawn):
        def sample_masks(self, index: int, count: int) -> tuple[np.ndarray, np.ndarray]:
            raise UsageError("none of the 3 pictures of x can be read")

    with pytest.raises(UsageError, match="^none of the 3 pictures of x can be read$"):
        encode_latents(vae, Empty(), tmp_path, 2)
