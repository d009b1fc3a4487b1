"""The example that trains the demonstration model: its data, losses and figures, and that it resumes exactly."""

from __future__ import annotations

import json
import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from pictures import noise, square
from torch import nn
from torch.nn import functional as F
from training_toys import STUDENT, small_vae

from examples.train_tiny import autoencoder, data, denoiser, evaluate, gpu, holes, metrics, objects, sharpen, training
from examples.train_tiny.credits import credits_table
from examples.train_tiny.evaluate import figures, fill
from examples.train_tiny.losses import (
    Adversary,
    balance,
    mean_colours,
    pattern_loss,
    pyramid_l1,
    texture_loss,
)
from examples.train_tiny.photographs import HELD_OUT, Case, border_mean, folder_cases, held_out_cases
from examples.train_tiny.scenes import draw_scene
from moebius_edge.errors import UsageError
from moebius_edge.metrics.fidelity import hole_psnr_db
from moebius_edge.model import StudentConfig, build_student, load_checkpoint
from moebius_edge.training.noising import Batch
from moebius_edge.training.recipe import LossRecipe

SMALL = ["--set", "block_out_channels=[8,8,8,8]", "--set", "validation=1", "--pixels", "8192", "--sides", "64", "32"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three drawn photographs, one more in a folder of its own."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    (folder / "aside").mkdir()
    for name in ("a.png", "b.png", "c.jpg", "aside/d.png"):
        noise = cv2.GaussianBlur(rng.uniform(0, 255, (96, 120, 3)), (0, 0), 3)
        cv2.imwrite(str(folder / name), cv2.normalize(noise, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8))
    return folder


def textured(side: int = 256) -> np.ndarray:
    grey = cv2.GaussianBlur(np.random.default_rng(1).uniform(0, 255, (side, side)), (0, 0), 1)
    return np.repeat(grey.astype(np.uint8)[..., None], 3, 2)


def test_photographs_are_listed_without_the_excluded_folder(photos: Path) -> None:
    assert data.list_photographs(photos) == ["a.png", "aside/d.png", "b.png", "c.jpg"]
    assert data.list_photographs(photos, ["aside"]) == ["a.png", "b.png", "c.jpg"]
    with pytest.raises(UsageError, match="holds no picture"):
        data.list_photographs(photos / "aside", ["aside"]) and data.list_photographs(Path(__file__).parent / "data")


def test_credits_name_everyone_and_set_the_held_out_apart(tmp_path: Path) -> None:
    rows = [("file", "title", "author", "licence", "source"), ("a/1.jpg", "One", "Ann", "CC0", "repo: x/1.jpg")]
    rows += [("a/2.jpg", "Two", "Ann", "CC0", "repo: x/2.jpg"), ("held-out/3.jpg", "Three | 3", "Bob", "MIT", "other")]
    (tmp_path / "PHOTOS.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    training, held_out = credits_table(tmp_path / "PHOTOS.tsv").split("\n\n")
    assert training.splitlines()[2:] == ["| One, Two | Ann | CC0 | repo |"] and training.startswith("| 2 photographs")
    assert held_out.splitlines()[2:] == ["| Three / 3 | Bob | MIT | other |"]


def test_validation_photographs_do_not_depend_on_the_others() -> None:
    names = [f"{i}.png" for i in range(20)]
    train, aside = data.split_validation(names, 5)
    assert sorted(train + aside) == sorted(names) and len(aside) == 5
    fewer = [name for name in names if name in aside or name in train[:8]]
    assert data.split_validation(fewer, 5)[1] == aside


def test_the_cache_returns_the_decoded_photographs(photos: Path, tmp_path: Path) -> None:
    names = data.list_photographs(photos, ["aside"])
    for cache in (data.open_cache(tmp_path / "photos.bin", photos, names) for _ in range(2)):  # made, then found
        expected = cv2.imread(str(photos / "b.png"))[..., ::-1]
        assert len(cache) == 3 and (cache[1] == expected).all()


def test_a_damaged_photograph_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"bad\.png cannot be decoded"):
        data.open_cache(tmp_path / "photos.bin", tmp_path, ["bad.png"])


def test_every_training_picture_depends_on_its_number_alone(photos: Path, tmp_path: Path) -> None:
    mixture = data.PictureMixture(data.open_cache(tmp_path / "photos.bin", photos, ["a.png", "b.png"]), seed=3)
    pictures = [mixture(number, 48) for number in range(60)]
    assert all(picture.shape == (48, 48, 3) and picture.dtype == np.uint8 for picture in pictures)
    assert all((mixture(number, 48) == pictures[number]).all() for number in (59, 7, 30))
    assert len({picture.tobytes() for picture in pictures}) == 60


def test_metrics_of_a_perfect_autoencoder() -> None:
    figures = metrics.evaluate(lambda picture: picture, [textured()], (0, 255))
    assert figures["psnr_db"] > 100 and figures["flat_error_max"] == 0
    assert all(figures[name] == pytest.approx(1) for name in ("texture_ratio", "mesh_ratio", "mesh_excess"))


def test_metrics_see_blur_and_do_not_take_it_for_a_mesh() -> None:
    figures = metrics.evaluate(lambda picture: cv2.GaussianBlur(picture, (0, 0), 1), [textured()], (0,))
    assert figures["texture_ratio"] < 0.3 and figures["mesh_ratio"] < 0.6
    assert figures["mesh_excess"] == pytest.approx(1, abs=0.15)


def test_metrics_see_a_mesh_and_wrong_flat_colours() -> None:
    mesh = np.tile(np.kron(np.eye(2), np.ones((4, 4))) * 12, (32, 32))[..., None]

    def meshed(picture: np.ndarray) -> np.ndarray:
        return np.clip(picture + mesh, 0, 255).astype(np.uint8)

    figures = metrics.evaluate(meshed, [textured()], (0, 100))
    assert figures["mesh_ratio"] > 1.1 and figures["mesh_excess"] > 1.2
    assert figures["flat_error_max"] == figures["flat_error_99"] == 12


@pytest.mark.parametrize(
    ("setting", "message"), [("width=3", "has no width"), ("warmup=much", "write the value as JSON")]
)
def test_a_wrong_setting_is_named(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        training.changed(autoencoder.Recipe(), [setting])


@pytest.mark.slow
def test_an_interrupted_training_continues_exactly(photos: Path, tmp_path: Path) -> None:
    common = ["--photos", str(photos), "--exclude", "aside", "--cache", str(tmp_path / "photos.bin"), *SMALL]

    def run(output: str, *more: str) -> bytes:
        autoencoder.main([*common, "--output", str(tmp_path / output), *more])
        return (tmp_path / output / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()

    whole = run("whole", "--decay-over", "4")
    run("parts", "--decay-over", "4", "--steps", "2")
    assert run("parts") == whole

    vae = str(tmp_path / "whole" / "vae")
    sharpen_options = [option for option in common if not option.startswith("block_out")]
    sharpen_options.remove("--set")
    sharpen.main([*sharpen_options, "--vae", vae, "--output", str(tmp_path / "sharpened"), "--steps", "2"])
    assert (tmp_path / "sharpened" / "sheet-000002.png").exists()


@pytest.fixture(scope="module")
def samples(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> objects.BranchSamples:
    file = tmp_path_factory.mktemp("cache") / "photos.bin"
    return objects.BranchSamples(data.PictureMixture(data.open_cache(file, photos, ["a.png", "b.png"]), 0), side=64)


def test_strokes_cover_what_upstreams_masks_do_and_every_kind_has_its_size() -> None:
    rng = np.random.default_rng(0)
    covered = {kind: np.array([holes.draw_hole(rng, 128, kind).mean() for _ in range(200)]) for kind in holes.KINDS}
    assert covered["strokes"].mean() == pytest.approx(0.34, abs=0.04)
    assert 0.12 < (covered["strokes"] > 0.5).mean() < 0.32  # a fifth
    limits = {"object": (0.1, 0.25), "box": (0.1, 0.2), "wire": (0.05, 0.13), "specks": (0.01, 0.06)}
    assert all(low < covered[kind].mean() < high for kind, (low, high) in limits.items())


def test_what_lies_in_the_hole_decides_the_branch(samples: objects.BranchSamples) -> None:
    drawn = [samples(number) for number in range(80)]
    assert all(mask.any() and not mask.all() and picture.shape == (64, 64, 3) for picture, mask, _ in drawn)
    assert all(np.array_equal(a, b) for a, b in zip(samples(11), drawn[11], strict=True))
    shares: dict[int, list[float]] = {objects.BACKGROUND: [], objects.FOREGROUND: []}
    for picture, mask, branch in drawn:
        shares[branch].append(objects.unlike_share(objects.cell_features(picture), mask))
    background, foreground = (np.array(values) for values in shares.values())
    background, foreground = background[~np.isnan(background)], foreground[~np.isnan(foreground)]
    assert len(background) > 15 and (background <= objects.BACKGROUND_SHARE).mean() > 0.8
    assert len(foreground) > 5 and np.median(foreground) > objects.OBJECT_SHARE


def test_a_hole_is_unlike_its_surroundings_by_colour_or_contrast() -> None:
    picture, mask = np.full((64, 64, 3), 100, np.uint8), square(64, 16, 48)
    assert objects.unlike_share(objects.cell_features(picture), mask) == 0
    picture[16:48, 16:32] = 160
    assert objects.unlike_share(objects.cell_features(picture), mask) == 0.5
    board = np.where(np.indices((64, 64)).sum(0) % 2, 60, 140)
    rough = np.where(mask[..., None], board[..., None], 100).astype(np.uint8).repeat(3, 2)
    assert objects.unlike_share(objects.cell_features(rough), mask) == 1
    assert math.isnan(objects.unlike_share(objects.cell_features(picture), np.eye(64, dtype=bool)))


def test_a_pasted_object_lies_under_its_mask() -> None:
    rng = np.random.default_rng(0)
    black, white = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)
    for _ in range(20):
        outline = holes.draw_outline(rng, 64)
        changed = objects.paste_object(rng, black, white, outline).any(-1)
        assert 0.001 < changed.mean() < 0.6 and not (changed & ~holes.covering_mask(rng, outline)).any()


@pytest.mark.parametrize("channels", [4, 8])
def test_the_pool_uses_every_sample_some_times_and_depends_on_the_number_alone(
    samples: objects.BranchSamples, channels: int
) -> None:
    pool = denoiser.PooledSamples(small_vae(channels=channels), samples, size=16, reuse=2)

    def draw(pool: denoiser.PooledSamples, number: int) -> tuple[np.ndarray, ...]:
        return pool.draw(number, np.random.default_rng(number))

    drawn = [draw(pool, number) for number in range(48)]
    clean, masked, mask, branch = drawn[40]
    assert clean.shape == masked.shape == (channels, 8, 8) and mask.shape == (1, 8, 8) and branch in (0, 1)
    again = draw(denoiser.PooledSamples(pool.vae, samples, size=16, reuse=2), 40)  # as after an interruption
    assert all(np.array_equal(a, b) for a, b in zip(again, drawn[40], strict=True))
    assert 12 <= len({clean.tobytes() for clean, *_ in drawn}) <= 40
    assert not {clean.tobytes() for clean, *_ in drawn[:8]} & {clean.tobytes() for clean, *_ in drawn[40:]}


def test_the_holes_border_counts_most_and_the_known_region_least() -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:6, 2:6] = 1
    border = denoiser.border_cells(mask)
    assert border.sum() == (36 - 16) + (16 - 4) and not border[0, 0, 3:5, 3:5].any() and not border[0, 0, 0].any()
    zeros, ones = torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8)
    alpha_bar = torch.tensor([0.5])
    batch = Batch(zeros, zeros, mask, ones, zeros, torch.tensor([1]), alpha_bar, zeros, torch.tensor([0]))
    task = denoiser.HoleTask(LossRecipe(hole_weight=5.0, velocity_limit=40.0), 10, "fp32")
    loss, shown = task(lambda *_: SimpleNamespace(noise=zeros), batch)  # type: ignore[arg-type]
    coarse = 5 * 4 * 4 * (1 / 4) ** 2  # a quarter of every 4x4 cells is hole, and all errors are alike
    assert loss.item() == pytest.approx(2 * ((32 * 8 + 4 * 5 + 28 * 1) / 64 + coarse))
    assert shown["hole_error"].item() == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [4, 8])
def test_a_step_is_taken_with_the_autoencoders_channels(
    samples: objects.BranchSamples, tmp_path: Path, channels: int
) -> None:
    options = SimpleNamespace(
        seed=0, steps=1, batch=2, pool=8, reuse=1, output=tmp_path, save_every=9, workers=1,
        channels=None, weights=None, learning_rate=3e-3,
    )  # fmt: skip
    pictures = objects.BranchSamples(samples.mixture)
    trainer = denoiser.build_trainer(options, small_vae(channels=channels), pictures)  # type: ignore[arg-type]
    batch = trainer.batch(tuple(np.stack(c) for c in zip(trainer.draw(0), trainer.draw(1), strict=True)))
    assert batch.noise.shape == (2, channels, 32, 32) and batch.sample.shape[1] == 2 * channels + 1
    figures = trainer.step([tuple(np.stack(c) for c in zip(trainer.draw(0), trainer.draw(1), strict=True))])
    assert math.isfinite(figures["task"]) and trainer.done == 1


@pytest.mark.slow
def test_the_gpus_training_writes_a_student_and_without_a_gpu_takes_the_same_steps(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = autoencoder.build_autoencoder(autoencoder.Recipe(block_out_channels=(8, 8, 8, 8)))
    vae.save_pretrained(tmp_path / "vae")
    for name, value in (("POOL", 16), ("GROUP", 8), ("VALIDATION", 1)):
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "settle", partial(gpu.settle, batches=1))
    arguments = ["--vae", str(tmp_path / "vae"), "--photos", str(photos), "--output", str(tmp_path / "out")]
    small = ["--minutes", "0.02", "--batch", "2", "--workers", "1", "--burst", "1", "--prefill", "8"]
    gpu.main([*arguments, *small, "--channels", "32", "32"])
    student = StudentConfig.from_dict(json.loads((tmp_path / "out" / "student.json").read_text()))
    assert student.latent_channels == 16
    load_checkpoint(build_student(student), tmp_path / "out" / "student.safetensors")


def test_the_learning_rate_of_a_timed_training_rises_and_falls() -> None:
    shares = [gpu.learning_rate_share(level / 40) for level in range(40)]
    assert 0.5 < shares[0] <= 1 and max(shares) == pytest.approx(1, abs=0.01) and shares[-1] < 0.02
    assert all(a > b for a, b in pairwise(shares[2:]))


@pytest.mark.slow
def test_an_interrupted_denoiser_continues_exactly(photos: Path, tmp_path: Path) -> None:
    vae = autoencoder.build_autoencoder(autoencoder.Recipe(block_out_channels=(8, 8, 8, 8)))
    vae.save_pretrained(tmp_path / "vae")
    common = ["--vae", str(tmp_path / "vae"), "--photos", str(photos), "--batch", "3", "--pool", "8"]

    def run(output: str, save_every: int) -> bytes:
        folder = tmp_path / output
        denoiser.main([*common, "--output", str(folder), "--steps", "2", "--save-every", str(save_every)])
        return (folder / "student.safetensors").read_bytes()

    whole = run("whole", 1)
    checkpoints = tmp_path / "parts" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step-000000001.pt").write_bytes(
        (tmp_path / "whole" / "checkpoints" / "step-000000001.pt").read_bytes()
    )
    assert run("parts", 2) == whole


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


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


def test_only_what_repeats_from_cell_to_cell_is_a_pattern() -> None:
    truth = image(1, 3, 64, 64)
    cell = image(1, 3, 8, 8, seed=1)
    cell = cell - cell.mean((2, 3), keepdim=True)
    mesh = cell.repeat(1, 1, 8, 8)
    assert pattern_loss(truth + mesh, truth).item() == pytest.approx(cell.abs().mean().item(), rel=1e-4)
    assert pattern_loss(truth + 0.3, truth).item() < 1e-6  # a shift of the colours repeats nothing
    other = image(1, 3, 64, 64, seed=2)
    assert pattern_loss(truth + other, truth).item() < 0.4 * other.abs().mean().item()


def test_mean_colours_are_those_of_8x8_blocks() -> None:
    picture = torch.zeros(1, 3, 8, 16)
    picture[..., :8] = torch.tensor([0.3, 0.6, -0.3])[:, None, None]
    picture[0, 0, :4, 8:] = 1  # half a block of red
    found = mean_colours(picture)
    assert found.shape == (1, 3, 1, 2)
    assert found[0, :, 0, 0].tolist() == pytest.approx([0.4, 1.8, 2.4], abs=1e-5)
    assert found[0, :, 0, 1].tolist() == pytest.approx([1 / 3, 1.5, -1.0], abs=1e-5)


def test_balanced_gradients_are_equally_long() -> None:
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    first, second = (weight**2).sum(), 0.01 * weight.sum()
    factor = balance(first, second, weight)
    assert not factor.requires_grad
    assert factor.item() == pytest.approx(10 / (0.01 * 2**0.5), rel=1e-3)
    assert balance(first, 0 * weight.sum(), weight, limit=50.0).item() == 50.0


def test_the_discriminator_learns_to_tell_blur_and_judging_teaches_it_nothing() -> None:
    torch.manual_seed(0)
    adversary = Adversary(2e-3, "cpu")
    weights = [p.detach().clone() for p in adversary.network.parameters()]
    blurred = F.avg_pool2d(torch.randn(2, 3, 64, 64), 5, 1, 2).requires_grad_()
    adversary.judge(blurred).backward()
    assert blurred.grad is not None and blurred.grad.abs().max() > 0
    assert all(p.grad is None for p in adversary.network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, adversary.network.parameters(), strict=True))
    blurs = [F.avg_pool2d(torch.randn(4, 3, 64, 64), 5, 1, 2) for _ in range(40)]
    losses = [adversary.learn(torch.randn(4, 3, 64, 64), blur) for blur in blurs]
    assert losses[0] > 1.5 and losses[-1] < 0.6
    sharp = torch.randn(2, 3, 64, 64)
    assert adversary.judge(sharp) < adversary.judge(F.avg_pool2d(sharp, 5, 1, 2))


@pytest.mark.parametrize("size", [32, 64, 100])
def test_scenes_are_pictures_that_repeat_and_vary(size: int) -> None:
    scenes = [draw_scene(np.random.default_rng(i), size) for i in range(6)]
    assert all(s.shape == (size, size, 3) and s.dtype == np.uint8 for s in scenes)
    assert np.array_equal(scenes[0], draw_scene(np.random.default_rng(0), size))
    assert len({s.tobytes() for s in scenes}) == 6
    assert np.mean([s.std() for s in scenes]) > 15  # neither black nor all clipped


def test_the_border_mean_is_that_of_the_ring() -> None:
    mask = square()
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[12:52, 12:52] = (10, 20, 30)  # the ring of eight pixels
    picture[12:52, 12:32] = (30, 20, 10)  # half of it
    picture[mask] = 255
    filled = border_mean(picture, mask)
    assert (filled[mask] == 20).all()
    assert np.array_equal(filled[~mask], picture[~mask]) and (picture[mask] == 255).all()


def test_held_out_cases_repeat() -> None:
    first, second, other = held_out_cases(2, 64), held_out_cases(2, 64), held_out_cases(2, 64, seed=1)
    assert [c.name for c in first] == [f"{name}-{i}" for name in HELD_OUT for i in range(2)]
    for a, b, c in zip(first, second, other, strict=True):
        assert np.array_equal(a.image, b.image) and np.array_equal(a.mask, b.mask)
        assert a.image.shape == (64, 64, 3) and a.image.dtype == np.uint8 and a.mask.dtype == bool
        assert 0.1 <= a.mask.mean() <= 0.4 and not np.array_equal(a.mask, c.mask)


def test_figures_of_a_perfect_and_of_a_flat_fill() -> None:
    cases = [Case("a", noise(), square()), Case("b", noise()[::-1].copy(), square(low=24, high=50))]
    perfect = figures([c.image for c in cases], cases)
    assert perfect["hole_psnr_db"] > 100 and perfect["hole_ssim"] == pytest.approx(1)
    assert perfect["perceptual_distance"] == 0 and perfect["texture_ratio"] == pytest.approx(1)
    flat = figures([border_mean(c.image, c.mask) for c in cases], cases)
    expected = np.mean([hole_psnr_db(border_mean(c.image, c.mask), c.image, c.mask) for c in cases])
    assert flat["hole_psnr_db"] == pytest.approx(expected) and flat["specks_percent"] == 0
    assert flat["hole_ssim"] < 0.7 and flat["perceptual_distance"] > 0.1 and flat["texture_ratio"] < 0.02


def test_specks_are_what_no_pixel_nearby_comes_close_to() -> None:
    picture, mask = np.full((64, 64, 3), 100, np.uint8), square()
    picture[mask] = 124  # within the limit
    assert metrics.speck_share(picture, mask) == 0
    row, column = np.argwhere(mask)[0]
    picture[row, column, 1] = 130
    assert metrics.speck_share(picture, mask) == pytest.approx(1 / mask.sum())


def test_a_network_fills_the_hole_from_noise_and_sees_nothing_of_it() -> None:
    vae, student = small_vae(), build_student(STUDENT)
    case = Case("a", noise(), square())
    other = Case("a", np.where(case.mask[..., None], np.uint8(7), case.image), case.mask)
    first, second = (fill(student, vae, [c], steps=2)[0] for c in (case, other))
    assert np.array_equal(first[~case.mask], case.image[~case.mask])
    assert not np.array_equal(first[case.mask], case.image[case.mask])
    assert np.array_equal(first, second)


class FakeInpainter:
    """Answers with the truth for one start and with black for the others."""

    def __init__(self, bundle: str) -> None:
        distilled = 2.0 if bundle == "distilled" else None
        self.bundle = SimpleNamespace(
            defaults={"steps": 20, "guidance": 1.0, "start": "prefill", "strength": 0.4}, distilled_guidance=distilled
        )

    def __enter__(self) -> FakeInpainter:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def inpaint(self, image: np.ndarray, mask: np.ndarray, *, start: str, **settings: object) -> object:
        assert ("guidance" in settings) == (self.bundle.distilled_guidance is None)
        return SimpleNamespace(image=image if start == "image" else np.zeros_like(image))


def test_every_bundle_setting_and_baseline_has_its_row(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "Inpainter", FakeInpainter)
    monkeypatch.setattr(evaluate, "folder_cases", lambda folder, count: folder_cases(folder, count, 96))
    sheet = tmp_path / "sheet.png"
    common = ["--photos", str(photos), "--cases", "8", "--start", "image", "noise", "--steps", "8"]
    evaluate.main(["--bundle", "plain", "--bundle", "distilled", *common, "--sheet", str(sheet)])
    first, second = (text.splitlines() for text in capsys.readouterr().out.strip().split("\n\n"))
    table = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in first[2:]}
    assert [name for name in table if "," not in name] == ["border mean", "Telea", "Navier-Stokes"]
    assert len(table) == 3 + 5 + 3 and "distilled, image, 8 steps, guidance distilled" in table
    assert float(table["plain, image, 8 steps, guidance 1.0"][0]) > 100 > float(table["Telea"][0])
    assert "plain, prefill, 20 steps, guidance 1.0, strength 0.4" in table
    assert [cell.strip() for cell in second[0].split("|")[2:-1]] == sorted(holes.KINDS)
    picture = cv2.imread(str(sheet))
    assert picture is not None and picture.shape == (9 * 96, 13 * 96, 3)
