"""Encoded pictures: what is encoded, and what a run knows an autoencoder by."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from test_samples import InMemory
from training_toys import small_vae

from moebius_edge.data.samples import MaskedPictures, Transform
from moebius_edge.errors import BundleError
from moebius_edge.imaging.masks import latent_mask
from moebius_edge.training.latents import EncodedPictures, encode_batch, vae_hash

torch.set_num_threads(1)
SIZE = 32


def drawn(count: int) -> tuple[torch.Tensor, ...]:
    """Samples of two pictures, one of which is said to be a foreground, as a loading process gives them."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3)).astype(np.uint8)
    hole = np.zeros((40, 50), bool)
    hole[10:25, 10:30] = True
    samples = MaskedPictures(InMemory(noise, [None, hole], [None, 1]), Transform(resolution=SIZE), 0)
    columns = zip(*(samples.sample(i) for i in range(count)), strict=True)
    return tuple(torch.from_numpy(np.stack(column)) for column in columns)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return small_vae(scaling_factor=2.0)


def expected_latents(vae: AutoencoderKL, image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        tensor = torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32))
        return (2 * vae.encode(tensor).latent_dist.mean[0]).numpy()


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() < 0.05 * np.abs(b).max())  # bfloat16


def test_samples_are_encoded_with_and_without_their_holes(vae: AutoencoderKL) -> None:
    images, masks, branches = drawn(6)  # more than the autoencoder takes at a time
    clean, masked, mask, branch = EncodedPictures(vae, None).latents((images, masks, branches))  # type: ignore[arg-type]
    assert (clean.shape, masked.shape, mask.shape) == ((6, 4, 4, 4), (6, 4, 4, 4), (6, 1, 4, 4))
    assert {t.dtype for t in (clean, masked, mask)} == {torch.float32} and not clean.requires_grad
    assert sorted(branch.tolist()) == [-1, -1, -1, 1, 1, 1]
    for i in range(6):
        scaled, hole = images[i].numpy() / 127.5 - 1, masks[i].numpy()
        assert close(clean[i].numpy(), expected_latents(vae, scaled))
        assert close(masked[i].numpy(), expected_latents(vae, np.where(hole[..., None], 0.0, scaled)))
        np.testing.assert_array_equal(mask[i, 0].numpy() > 0, latent_mask(hole, 4))
    assert not torch.equal(masked, clean)


def test_a_sample_of_the_posterior_is_drawn_by_torch_s_generator(vae: AutoencoderKL) -> None:
    images, masks, _ = (part.numpy() for part in drawn(2))
    mean, *_ = encode_batch(vae, images, masks[:, None])
    torch.manual_seed(3)
    one, *_ = encode_batch(vae, images, masks[:, None], sampled=True)
    other, *_ = encode_batch(vae, images, masks[:, None], sampled=True)
    torch.manual_seed(3)
    again, *_ = encode_batch(vae, images, masks[:, None], sampled=True)
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one, mean)


def test_the_hash_of_a_vae_is_of_its_weights_and_settings(vae: AutoencoderKL) -> None:
    named, nudged = small_vae(0, 2.0), small_vae(0, 2.0)
    named.register_to_config(_name_or_path="elsewhere")
    assert vae_hash(named) == vae_hash(vae)
    with torch.no_grad():
        list(nudged.parameters())[-1][0] += 1e-6
    others = [small_vae(1, 2.0), small_vae(0, 3.0), nudged, small_vae(0, 2.0).half()]
    assert len({vae_hash(model) for model in (vae, *others)}) == 5


def test_latents_that_are_not_finite_are_refused() -> None:
    broken = small_vae()
    with torch.no_grad():
        broken.quant_conv.bias[0] = torch.inf
    with pytest.raises(BundleError, match=r"gives latents that are not finite: its weights are damaged, or no VAE"):
        EncodedPictures(broken, None).latents(drawn(1))  # type: ignore[arg-type]
