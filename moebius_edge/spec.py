"""The contract between an exported bundle and whatever runs it: tensors, constants of the sampler.

One ordered table a component gives names, symbolic shapes and types (``COMPONENTS``); export writes
it into ``bundle.json``, every runtime checks its inputs against it.
"""

from __future__ import annotations

from dataclasses import dataclass

LATENT_CHANNELS = 4  # of the published autoencoder; a bundle says its own
LATENT_DOWNSCALE = 8  # image pixels per latent position, each way
NUM_PROMPTS = 10  # prompt ids 0..9 condition, 10..19 are the unconditional branch
NOISE_OFFSET = 0.0357  # upstream's: one extra normal draw per image and channel, added to the noise
NUM_TRAIN_TIMESTEPS = 1000
MAX_LATENT_CHANNELS = 128  # more would only take memory
BETA_START, BETA_END = 0.00085, 0.012  # scaled linear


@dataclass(frozen=True)
class Tensor:
    """Name, type and symbolic shape of one graph input or output.

    ``shape`` holds ints for fixed sizes and strings for free ones: ``N`` batch, ``c`` the channels of a
    latent, ``2c+1`` those of the denoiser's input, ``h``/``w`` the latent size, ``H``/``W`` the image
    size. A bundle fixes all but ``N``.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def resolved(self, resolution: int, latent_channels: int = LATENT_CHANNELS) -> Tensor:
        """The same tensor with the sizes of a model of ``resolution`` pixels filled in."""
        latent = resolution // LATENT_DOWNSCALE
        sizes: dict[int | str, int] = {"h": latent, "w": latent, "H": resolution, "W": resolution}
        sizes |= {"c": latent_channels, "2c+1": sample_channels(latent_channels)}
        return Tensor(self.name, self.dtype, tuple(sizes.get(d, d) for d in self.shape))


def sample_channels(latent_channels: int) -> int:
    """The channels of the denoiser's input: the noisy latent, the mask, the masked image's latent."""
    return 2 * latent_channels + 1


@dataclass(frozen=True)
class Component:
    """One ONNX graph of a bundle."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def file(self) -> str:
        return f"{self.name}.onnx"


# Images are RGB in [-1, 1]. Latents are scaled (times the VAE's scaling factor) on both sides: the
# factor is inside the graphs, and the encoder returns the posterior's mean.
COMPONENTS: dict[str, Component] = {
    c.name: c
    for c in (
        Component(
            "vae_encoder",
            (Tensor("image", "float32", ("N", 3, "H", "W")),),
            (Tensor("latent", "float32", ("N", "c", "h", "w")),),
        ),
        Component(
            "denoiser",
            (
                Tensor("sample", "float32", ("N", "2c+1", "h", "w")),  # noisy latent, mask, masked image's latent
                Tensor("timestep", "float32", ("N",)),
                Tensor("branch", "int64", ("N",)),  # 0 conditional, 1 unconditional
            ),
            (Tensor("noise", "float32", ("N", "c", "h", "w")),),
        ),
        Component(
            "vae_decoder",
            (Tensor("latent", "float32", ("N", "c", "h", "w")),),
            (Tensor("image", "float32", ("N", 3, "H", "W")),),
        ),
    )
}

DENOISER, SHALLOW, DEEP = "denoiser", "denoiser_shallow", "deep"


def components(deep_channels: int | None) -> dict[str, Component]:
    """``COMPONENTS``; with the deep feature's channels those of a bundle that can reuse it (see ``sampling.calls``).

    Its denoiser also returns ``deep``, and ``denoiser_shallow`` is given one beside the denoiser's inputs.
    """
    if deep_channels is None:
        return dict(COMPONENTS)
    encoder, denoiser, decoder = COMPONENTS.values()
    deep = Tensor(DEEP, "float32", ("N", deep_channels, "h", "w"))
    full = Component(DENOISER, denoiser.inputs, (*denoiser.outputs, deep))
    shallow = Component(SHALLOW, (*denoiser.inputs, deep), denoiser.outputs)
    return {c.name: c for c in (encoder, full, shallow, decoder)}
