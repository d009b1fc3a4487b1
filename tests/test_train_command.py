"""``moebius-edge train``: mistakes and their exit codes, and the whole recipe in miniature."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moebius_edge.cli import main
from moebius_edge.errors import BundleError, UsageError
from moebius_edge.export.source import find_source, load_config, load_student, load_vae
from moebius_edge.model import StudentConfig, build_student, load_checkpoint
from moebius_edge.training import autoencoder, tiny
from moebius_edge.training.autoencoder import AutoencoderRecipe, Stage, build_autoencoder
from moebius_edge.training.denoiser import DenoiserRecipe, DenoiserTrainer
from moebius_edge.training.tiny import TinyRecipe, save_checkpoint, train_tiny

torch.set_num_threads(1)
STUDENT = StudentConfig(
    block_out_channels=(32, 32, 32), num_heads=4, cross_attention_dim=16, prompt_embedding_dim=16, latent_size=8
)
RECIPE = TinyRecipe(
    autoencoder=AutoencoderRecipe(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, stages=(Stage(2, 1, 16),), decoder_stage=Stage(2, 1, 32)
    ),
    denoiser=DenoiserRecipe(student=STUDENT, steps=3, batch=2),
    pictures=3,
    masks_per_picture=2,
)


class SmallSource:
    """Random pixels in place of photographs, never larger than 64 pixels."""

    def __init__(self, size: int, photo_share: float) -> None:
        self.size = min(size, 64)

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(0, 256, (self.size, self.size, 3)).astype(np.uint8)


def shrink(patch: pytest.MonkeyPatch) -> None:
    settle = DenoiserTrainer.settle_batch_norms
    patch.setattr(autoencoder, "PictureSource", SmallSource)
    patch.setattr(tiny, "PictureSource", SmallSource)
    patch.setattr(DenoiserTrainer, "settle_batch_norms", lambda self: settle(self, 2))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("train") / "new" / "run"
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        assert train_tiny(output, RECIPE) == output / "checkpoint"
    return output


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["train", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_an_unknown_preset_or_device_is_a_usage_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = str(tmp_path / "run")
    assert run(capsys, "-o", output, "--preset", "huge") == (2, "", "error: there is no preset 'huge': use tiny\n")
    code, _, err = run(capsys, "-o", output, "--device", "tpu")
    assert (code, err) == (2, "error: there is no device 'tpu': use cpu or cuda\n")
    assert run(capsys)[0] == 2 and not (tmp_path / "run").exists()


def test_a_missing_gpu_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run(capsys, "-o", str(tmp_path / "run"), "--device", "cuda")
    assert code == 3 and "PyTorch finds no CUDA GPU here: use --device cpu" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for module in ("tiny", "autoencoder"):
        monkeypatch.delitem(sys.modules, f"moebius_edge.training.{module}")
    code, _, err = run(capsys, "-o", str(tmp_path / "run"))
    assert (code, err) == (3, 'error: training needs diffusers: pip install "moebius-edge[train]"\n')


def test_a_missing_photograph_package_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    code, _, err = run(capsys, "-o", str(tmp_path / "run"))
    assert (code, err) == (3, 'error: training needs skimage.data: pip install "moebius-edge[train]"\n')


def test_a_module_of_ours_that_is_missing_is_no_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moebius_edge.training.tiny", None)
    with pytest.raises(ModuleNotFoundError):
        main(["train", "-o", str(tmp_path / "run")])


def test_an_output_that_is_a_file_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    code, _, err = run(capsys, "-o", str(tmp_path / "file"))
    assert code == 2 and "file is, or lies in, a file: name a folder" in err


def test_an_interruption_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "train_tiny", interrupted)
    code, _, err = run(capsys, "-o", str(tmp_path))
    assert (code, err) == (130, f"interrupted; the same command resumes from what lies in {tmp_path}\n")


def test_the_command_says_what_to_do_next(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []

    def trained(output: Path, recipe: TinyRecipe, device: str) -> Path:
        given.extend((output, recipe, device))
        return output / "checkpoint"

    monkeypatch.setattr(tiny, "train_tiny", trained)
    code, out, _ = run(capsys, "-o", str(tmp_path))
    assert code == 0 and given == [tmp_path, TinyRecipe(), "cpu"]
    assert f"next: moebius-edge export {tmp_path}/checkpoint/student.safetensors --vae" in out


def test_the_miniature_makes_a_checkpoint_to_export(finished: Path) -> None:
    assert sorted(p.name for p in finished.iterdir()) == [
        "checkpoint", "latents", "recipe.json", "state.pt", "vae", "vae_finetuned",
    ]  # fmt: skip
    checkpoint = finished / "checkpoint"
    assert sorted(p.name for p in checkpoint.iterdir()) == [
        "student.json",
        "student.safetensors",
        "training.json",
        "vae",
    ]
    weights = load_file(checkpoint / "student.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float16, torch.int64}
    student = build_student(STUDENT)
    load_checkpoint(student, checkpoint / "student.safetensors")

    source = find_source(checkpoint / "student.safetensors", checkpoint / "vae", None)
    config = load_config(source)
    assert config == STUDENT
    vae, loaded = load_vae(source), load_student(source, config)
    assert next(loaded.parameters()).dtype == torch.float32
    assert vae.config["scaling_factor"] == 1.0 and vae.dtype == torch.float32
    with torch.no_grad():
        latent = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
        assert latent.shape == (1, 4, 8, 8) and vae.decode(latent).sample.isfinite().all()
    assert json.loads((checkpoint / "training.json").read_text())["denoiser"]["steps"] == 3


def test_the_finetuned_decoder_is_the_one_in_the_checkpoint(finished: Path) -> None:
    vaes = {
        name: load_file(finished / name / "diffusion_pytorch_model.safetensors")
        for name in ("vae", "vae_finetuned", "checkpoint/vae")
    }
    kept = vaes["checkpoint/vae"]
    assert all(torch.equal(t.half(), kept[k]) for k, t in vaes["vae_finetuned"].items())
    encoder = [k for k in kept if k.startswith("encoder.")]
    assert encoder and all(torch.equal(vaes["vae"][k].half(), kept[k]) for k in encoder)
    assert not all(torch.equal(vaes["vae"][k].half(), kept[k]) for k in kept)


def test_a_finished_run_is_returned_at_once(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in ("train_autoencoder", "encode_latents", "DenoiserTrainer", "finetune_decoder", "save_checkpoint"):
        monkeypatch.delattr(tiny, stage)
    times = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert train_tiny(finished, RECIPE) == finished / "checkpoint"
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == times


def test_a_lost_checkpoint_is_made_again_from_what_is_left(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    monkeypatch.delattr(tiny, "train_autoencoder")
    monkeypatch.delattr(tiny, "finetune_decoder")
    path = finished / "checkpoint" / "student.safetensors"
    before = path.read_bytes()
    path.unlink()
    (finished / "checkpoint" / "training.json").unlink()
    train_tiny(finished, RECIPE)
    assert path.read_bytes() == before


def test_a_run_of_another_recipe_is_refused(finished: Path) -> None:
    with pytest.raises(UsageError, match=r"run holds a run of another recipe, see recipe.json in it: give another"):
        train_tiny(finished, replace(RECIPE, pictures=4))


def test_a_damaged_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(BundleError, match=r"recipe.json cannot be read .*: give another output folder"):
        train_tiny(tmp_path, RECIPE)


def test_saving_leaves_the_autoencoder_as_it_was_and_refuses_infinite_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, vae = build_student(STUDENT), build_autoencoder(RECIPE.autoencoder)
    save_checkpoint(student, vae, RECIPE, tmp_path / "checkpoint")
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    with torch.no_grad():
        student.embedding_layer.weight[0, 0] = 1e5  # beyond float16
    with pytest.raises(BundleError, match=r"embedding_layer.weight is not finite in float16: lower the recipe's"):
        save_checkpoint(student, vae, RECIPE, tmp_path / "other")
    assert not (tmp_path / "other").exists()
