"""The autoencoder's losses on known values, latents evened out exactly, and runs that resume bit for bit."""

from __future__ import annotations

import copy
import math
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from moebius_edge.errors import BundleError, MachineError, UsageError
from moebius_edge.training import autoencoder
from moebius_edge.training.autoencoder import (
    AutoencoderRecipe,
    Stage,
    Trainer,
    build_autoencoder,
    finetune_decoder,
    load_autoencoder,
    mean_colours,
    normalise_latents,
    pattern_loss,
    pyramid_l1,
    random_filters,
    save_autoencoder,
    texture_loss,
    train_autoencoder,
)
from moebius_edge.training.data import to_network

torch.set_num_threads(1)
RECIPE = AutoencoderRecipe(
    block_out_channels=(8, 8, 8, 8),
    norm_num_groups=4,
    stages=(Stage(3, 2, 16), Stage(2, 1, 32)),
    warmup=2,
    decoder_stage=Stage(3, 1, 32),
)


class Stop(Exception):
    """Raised by a test in the middle of a run."""


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def small_model(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return build_autoencoder(RECIPE)


def same(a: nn.Module, b: nn.Module, prefixes: tuple[str, ...] = ("",)) -> bool:
    states = [{k: v for k, v in m.state_dict().items() if k.startswith(prefixes)} for m in (a, b)]
    assert states[0] and states[0].keys() == states[1].keys()
    return all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.fixture(autouse=True)
def noise_for_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random pixels in place of photographs, which take their time to load."""

    class Source:
        def __init__(self, size: int, photo_share: float) -> None:
            self.size = min(size, 32)

        def __call__(self, rng: np.random.Generator) -> np.ndarray:
            return rng.integers(0, 256, (self.size, self.size, 3)).astype(np.uint8)

    monkeypatch.setattr(autoencoder, "PictureSource", Source)


def test_the_pyramid_loss_is_zero_at_equality_only() -> None:
    a = image(2, 3, 16, 16)
    assert pyramid_l1(a, a.clone()).item() == 0
    assert pyramid_l1(a, a + 0.01).item() > 0


def test_the_pyramid_loss_of_a_shift_counts_pixels_and_the_coarsest_level() -> None:
    a = image(1, 3, 16, 16)
    assert pyramid_l1(a + 0.5, a).item() == pytest.approx(0.5 + 2 * 0.5, abs=1e-5)  # a constant has no bands


def test_the_pyramid_loss_of_a_checkerboard_counts_the_finest_band_twice() -> None:
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 8)[None, None].expand(1, 3, 16, 16)
    assert pyramid_l1(board, torch.zeros_like(board)).item() == pytest.approx(1 + 1)


def test_texture_is_compared_by_its_amount_not_its_place() -> None:
    a = image(1, 3, 64, 64)
    assert texture_loss(a, a).item() == 0
    moved, blurred = torch.roll(a, (8, 8), (2, 3)), nn.functional.avg_pool2d(a, 3, 1, 1)
    assert texture_loss(moved, a).item() < 0.2 * texture_loss(blurred, a).item()
    assert texture_loss(torch.zeros_like(a), a).item() > texture_loss(a / 2, a).item()
    # Half the contrast is a quarter of the energy at both bands, each of which counts half its logarithm.
    assert texture_loss(a / 2, a, floor=1e-9).item() == pytest.approx(2 * math.log(2), rel=1e-3)


def test_texture_of_another_kind_is_told_apart() -> None:
    """Stripes of equal contrast, along and across."""
    x = torch.sin(torch.arange(64) * 1.3).expand(1, 3, 64, 64)
    assert texture_loss(x.mT, x).item() > 0.3


def test_only_what_repeats_from_cell_to_cell_is_a_pattern() -> None:
    truth = image(1, 3, 64, 64)
    cell = image(1, 3, 8, 8, seed=1)
    cell = cell - cell.mean((2, 3), keepdim=True)
    mesh = cell.repeat(1, 1, 8, 8)
    assert pattern_loss(truth + mesh, truth).item() == pytest.approx(cell.abs().mean().item(), rel=1e-4)
    assert pattern_loss(truth + 0.3, truth).item() < 1e-6  # a shift of the colours repeats nothing
    other = image(1, 3, 64, 64, seed=2)
    assert pattern_loss(truth + other, truth).item() < 0.4 * other.abs().mean().item()


def test_filters_answer_nothing_to_a_flat_picture() -> None:
    filters = random_filters()
    assert torch.equal(filters, random_filters())
    assert nn.functional.conv2d(torch.ones(1, 3, 9, 9), filters).abs().max() < 1e-5
    assert filters.flatten(1).norm(dim=1).tolist() == pytest.approx([1.0] * len(filters), abs=1e-5)


def test_mean_colours_are_those_of_8x8_blocks() -> None:
    picture = torch.zeros(1, 3, 8, 16)
    picture[..., :8] = torch.tensor([0.3, 0.6, -0.3])[:, None, None]
    picture[0, 0, :4, 8:] = 1  # half a block of red
    found = mean_colours(picture)
    assert found.shape == (1, 3, 1, 2)
    assert found[0, :, 0, 0].tolist() == pytest.approx([0.4, 1.8, 2.4], abs=1e-5)
    assert found[0, :, 0, 1].tolist() == pytest.approx([1 / 3, 1.5, -1.0], abs=1e-5)


@torch.no_grad()
def test_normalised_latents_are_even_and_decode_to_the_same() -> None:
    model, pictures = small_model().eval(), np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3)).astype(np.uint8)
    pictures[3:] //= 2  # brightness differs, so the latents have some spread
    tensor = torch.from_numpy(to_network(pictures))
    before = model.encode(tensor).latent_dist
    decoded = model.decode(before.mean).sample
    normalise_latents(model, pictures)
    after = model.encode(tensor).latent_dist
    assert after.mean.mean((0, 2, 3)).abs().max() < 1e-3
    assert after.mean.std((0, 2, 3)).tolist() == pytest.approx([1.0] * 4, abs=1e-4)
    assert torch.allclose(model.decode(after.mean).sample, decoded, atol=1e-4)
    spread = before.mean.std((0, 2, 3))[None, :, None, None]
    assert torch.allclose(after.std * spread, before.std, rtol=1e-3)  # the posterior keeps its relative width


def test_training_the_decoder_leaves_the_encoder_bit_identical(tmp_path: Path) -> None:
    model = small_model()
    before = copy.deepcopy(model)
    tuned = finetune_decoder(model, RECIPE, tmp_path / "vae_finetuned")
    assert same(before, tuned, ("encoder.", "quant_conv."))
    assert not same(before, tuned, ("decoder.",)) and not same(before, tuned, ("post_quant_conv.",))
    assert same(load_autoencoder(tmp_path / "vae_finetuned"), tuned)
    assert [p.name for p in tmp_path.iterdir()] == ["vae_finetuned"]


def test_training_writes_an_autoencoder_of_unit_latents(tmp_path: Path) -> None:
    model = train_autoencoder(RECIPE, tmp_path / "run" / "vae")
    loaded = load_autoencoder(tmp_path / "run" / "vae")
    assert same(model, loaded) and loaded.config["scaling_factor"] == 1.0 and not loaded.training
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["vae"]


def stop_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Saves after every step, and stops in the middle of the one after ``steps``."""
    whole_run, whole_step = Trainer.run, Trainer.step

    def run(self: Trainer, *given: object) -> AutoencoderKL:
        return whole_run(self, *given, save_every=1)  # type: ignore[arg-type]

    def step(self: Trainer, *given: object) -> dict[str, float]:
        if self.done == steps:
            raise Stop
        return whole_step(self, *given)  # type: ignore[arg-type]

    patch.setattr(Trainer, "run", run)
    patch.setattr(Trainer, "step", step)


@pytest.mark.parametrize("steps", [2, 3, 4])  # within, between and within the stages
def test_an_interrupted_training_ends_as_an_uninterrupted_one(steps: int, tmp_path: Path) -> None:
    whole = train_autoencoder(RECIPE, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_after(steps, patch)
        train_autoencoder(RECIPE, tmp_path / "vae")
    assert (tmp_path / "vae_state.pt").exists() and not (tmp_path / "vae").exists()
    torch.manual_seed(99)  # as another process would have it
    assert same(train_autoencoder(RECIPE, tmp_path / "vae"), whole)
    assert not (tmp_path / "vae_state.pt").exists()


@pytest.fixture
def interrupted(tmp_path: Path) -> Iterator[Path]:
    """A decoder's training after two of its three steps."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_after(2, patch)
        finetune_decoder(small_model(), RECIPE, tmp_path / "vae")
    assert (tmp_path / "vae_state.pt").exists()
    yield tmp_path


def test_an_interrupted_decoder_goes_on(interrupted: Path) -> None:
    tuned = finetune_decoder(small_model(), RECIPE, interrupted / "vae")
    assert same(tuned, finetune_decoder(small_model(), RECIPE, interrupted / "whole"))


def test_a_decoder_does_not_go_on_with_another_encoder(interrupted: Path) -> None:
    with pytest.raises(UsageError, match=r"vae_state.pt was made with another encoder: remove it"):
        finetune_decoder(small_model(seed=1), RECIPE, interrupted / "vae")


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_spoilt(tmp_path: Path) -> None:
    model = small_model()
    trainer = Trainer("autoencoder", model, RECIPE, 1e-3, "cpu", tmp_path / "state.pt")
    before, pictures = copy.deepcopy(model), np.zeros((1, 16, 16, 3), np.uint8)

    def loss(model: AutoencoderKL, image: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        return model.post_quant_conv.bias.sum() * float("nan"), {}

    def steep(model: AutoencoderKL, image: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        bias = model.post_quant_conv.bias
        return (bias - bias.detach()).abs().sqrt().sum(), {}  # 0, with an infinite slope

    with pytest.raises(BundleError, match="the autoencoder's loss is nan at step 0: lower the recipe's learning rate"):
        trainer.step(pictures, loss, 10)
    with pytest.raises(BundleError, match="the autoencoder's gradient is (nan|inf) at step 0"):
        trainer.step(pictures, steep, 10)
    assert same(model, before) and trainer.done == 0


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match=r"vae is not overwritten, it holds no config.json"):
        save_autoencoder(small_model(), tmp_path / "vae")
    assert (tmp_path / "vae" / "mine.txt").read_text() == "x"


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """safetensors has an error of its own for it, which is no ``OSError``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(MachineError, match=r"cannot write .*vae: "):
            save_autoencoder(small_model(), tmp_path / "vae")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_damaged_autoencoder_is_named(damage: str, tmp_path: Path) -> None:
    save_autoencoder(small_model(), tmp_path / "vae")
    (tmp_path / "vae" / damage).write_bytes(b"{")
    with pytest.raises(BundleError, match=r"vae is no whole autoencoder \(.*\): remove it and train it again"):
        load_autoencoder(tmp_path / "vae")
