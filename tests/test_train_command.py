"""``moebius-edge train``: mistakes and their exit codes, the stages on a user's pictures, the recipe in miniature."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from training_toys import RECIPE as STAGE
from training_toys import STUDENT, TEACHER

from moebius_edge import training
from moebius_edge.calibration.blocks import Recipe as QuantisationRecipe
from moebius_edge.cli import main
from moebius_edge.errors import BundleError, UsageError
from moebius_edge.export.source import find_source, load_config, load_student, load_vae
from moebius_edge.export.weights_metadata import find_guidance
from moebius_edge.model import build_student, load_checkpoint
from moebius_edge.training import autoencoder, data, tiny
from moebius_edge.training.autoencoder import AutoencoderRecipe, Stage, build_autoencoder, save_autoencoder
from moebius_edge.training.recipe import RunOptions
from moebius_edge.training.tiny import TinyRecipe, save_checkpoint, train_tiny
from moebius_edge.training.trainer import Trainer

torch.set_num_threads(1)
_SHORT = replace(STAGE, optimiser=replace(STAGE.optimiser, steps=2, batch=2))
_TASK = replace(_SHORT, losses=replace(_SHORT.losses, terms=("task",)))
RECIPE = TinyRecipe(
    autoencoder=AutoencoderRecipe(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, stages=(Stage(2, 1, 16),), decoder_stage=Stage(2, 1, 32)
    ),
    teacher=replace(_TASK, stage="teacher", student=replace(STUDENT, latent_size=8)),
    teacher_full=replace(_TASK, stage="teacher"),
    student=_TASK,
    distilled=_SHORT,
    pictures=3,
    masks_per_picture=2,
)
OPTIONS = RunOptions(device="cpu", sample_every=2)


class SmallSource:
    """Random pixels in place of photographs, never larger than 64 pixels."""

    def __init__(self, size: int, photo_share: float) -> None:
        self.size = min(size, 64)

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(0, 256, (self.size, self.size, 3)).astype(np.uint8)


def shrink(patch: pytest.MonkeyPatch) -> None:
    settle = Trainer.settle_batch_norms
    patch.setattr(autoencoder, "PictureSource", SmallSource)
    patch.setattr(data, "PictureSource", SmallSource)
    patch.setattr(Trainer, "settle_batch_norms", lambda self: settle(self, 2))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("train") / "new" / "run"
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        assert train_tiny(output, RECIPE, OPTIONS) == output / "checkpoint"
    return output


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["train", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "huge"), "there is no preset 'huge': use tiny, moebius"),
        (("--stage", "dream"), "there is no stage 'dream': use all, teacher, student, guidance, int8"),
        (("--device", "tpu"), "device is 'tpu': use auto, cpu, cuda"),
        (("--preset", "moebius", "--stage", "all"), "stage all is preset tiny's: train moebius stage by stage"),
        (("--vae", "somewhere"), "--vae does not go with stage all: name a stage, such as --stage student"),
        (("--set", "optimiser.steps=2"), "--set does not go with stage all"),
        (("--stage", "student", "--set", "optimiser.stepz=2"), "the recipe has no optimiser.stepz"),
        (("--preset", "moebius"), "there is nothing to train on: add --images SOURCE, or --latents DIR"),
        (("--stage", "student", "--set", "stage=teacher"), "--set 'stage=teacher' changes the stage: add --stage"),
        (("--keep", "0"), "keep is 0: give 1 or more"),
        (("--device", "cpu", "--fsdp"), "FSDP shards a network over processes, and there is one: leave it out"),
        (("--device", "cpu", "--fsdp", "--stage", "student"), "FSDP shards a network over processes"),
        (("--stage", "int8"), "stage int8 has to know which blocks will be quantised: add --int8-recipe FILE.json"),
        (("--stage", "student", "--int8-recipe", "r.json"), "--int8-recipe goes with stage int8: add --stage int8"),
    ],
)
def test_mistakes_are_usage_errors(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run(capsys, "-o", tmp_path / "run", *arguments)
    assert (code, out) == (2, "") and err.startswith(f"error: {message}") and err.count("\n") == 1
    assert run(capsys)[0] == 2 and not (tmp_path / "run" / "train.json").exists()


def test_what_is_named_and_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    stage = ("-o", tmp_path / "run", "--stage", "student")
    code, _, err = run(capsys, *stage, "--teacher", tmp_path / "no.bin")
    assert code == 3 and "there is no checkpoint" in err
    assert run(capsys, *stage, "--vae", tmp_path / "no")[0] == 3
    code, _, err = run(capsys, *stage, "--config", tmp_path / "no.toml")
    assert code == 3 and "no.toml cannot be read" in err


def test_a_missing_gpu_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run(capsys, "-o", tmp_path / "run", "--device", "cuda")
    assert code == 3 and "PyTorch finds no CUDA GPU here: use --device cpu" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["diffusers", "accelerate"])
def test_a_missing_package_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for name in [m for m in sys.modules if m.startswith("moebius_edge.training.")]:
        short = name.rpartition(".")[2]
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(training, short, getattr(training, short))  # so that the package's attribute comes back too
    code, _, err = run(capsys, "-o", tmp_path / "run")
    assert (code, err) == (3, f'error: training needs {package}: pip install "moebius-edge[train]"\n')


def test_a_missing_photograph_package_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    code, _, err = run(capsys, "-o", tmp_path / "run", "--device", "cpu")
    assert (code, err) == (3, 'error: training needs skimage.data: pip install "moebius-edge[train]"\n')


def test_a_module_of_ours_that_is_missing_is_no_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moebius_edge.training.tiny", None)
    with pytest.raises(ModuleNotFoundError):
        main(["train", "-o", str(tmp_path / "run")])


def test_an_output_that_is_a_file_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    code, _, err = run(capsys, "-o", tmp_path / "file")
    assert code == 2 and "file is, or lies in, a file: name a folder" in err


def test_an_interruption_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "train_tiny", interrupted)
    code, _, err = run(capsys, "-o", tmp_path)
    assert (code, err) == (130, f"interrupted; add --resume to go on from what lies in {tmp_path}\n")


def test_the_command_says_what_to_do_next(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []

    def trained(output: Path, recipe: TinyRecipe, options: RunOptions, resume: bool) -> Path:
        given.extend((output, recipe, options.device, resume))
        return output / "checkpoint"

    monkeypatch.setattr(tiny, "train_tiny", trained)
    code, out, _ = run(capsys, "-o", tmp_path, "--device", "cpu", "--resume")
    assert code == 0 and given == [tmp_path, TinyRecipe(), "cpu", True]
    assert f"next: moebius-edge export {tmp_path}/checkpoint/student.safetensors --vae" in out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of pictures, one of them damaged, and an autoencoder."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(5):
        cv2.imwrite(str(folder / f"{number}.png"), rng.integers(0, 256, (70 + number, 90, 3)).astype(np.uint8))
    (folder / "damaged.png").write_bytes(b"no picture")
    vae = tmp_path_factory.mktemp("vae") / "vae"
    torch.manual_seed(0)
    save_autoencoder(build_autoencoder(RECIPE.autoencoder), vae)
    return folder, vae


def test_the_stages_on_a_folder_of_pictures(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, pictures: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    images, vae = pictures
    config = tmp_path / "small.toml"
    config.write_text(
        "[student]\nblock_out_channels = [32, 32, 32]\nnum_heads = 4\ncross_attention_dim = 16\n"
        "prompt_embedding_dim = 16\nlatent_size = 8\nlayers_per_block = 1\nwindow = 5\n"
        "[teacher]\nblock_out_channels = [32, 32, 32, 32]\nnum_heads = 4\ncross_attention_dim = 16\n"
        "prompt_embedding_dim = 16\nlayers_per_block = 1\ngate_rank = 4\n"
        '[losses]\ndistance = "teacher"\n[optimiser]\nsteps = 2\nbatch = 2\n'
    )
    common = ("--preset", "moebius", "--config", config, "--vae", vae, "--device", "cpu", "--sample-every", "2")
    code, out, err = run(capsys, "-o", tmp_path / "t", "--stage", "teacher", "--images", images, *common)
    assert code == 0 and out == f"saved {tmp_path}/t/teacher.safetensors\n"
    assert "1 pictures could not be read: see" in err
    assert (tmp_path / "t" / "unreadable.txt").read_text().startswith("damaged.png\t")

    teacher, latents = tmp_path / "t" / "teacher.safetensors", tmp_path / "t" / "latents"
    given = ("--teacher", teacher, "--latents", latents, *common)
    code, out, err = run(capsys, "-o", tmp_path / "s", "--stage", "student", *given)
    student = tmp_path / "s" / "student.safetensors"
    assert code == 0 and out.endswith(f"next: moebius-edge export {student} --vae {vae} --output BUNDLE\n")
    assert "perceptual distance: teacher" in err
    grid = cv2.imread(str(tmp_path / "s" / "samples" / "step-000000002.png"))
    assert grid is not None and grid.shape == (4 * 64, 3 * 64, 3)
    record = json.loads((tmp_path / "s" / "train.json").read_text())
    assert record["material"]["teacher"]["path"] == str(teacher) and record["perceptual_distance"] == "teacher"
    made_from = record["material"]["samples"]["made_from"]["parts"]
    assert made_from["count"] == 6 and len(made_from["vae"]) == 64

    online = ("--images", images, "--set", "data.cache=false", "--student", student, *common)
    code, _, err = run(capsys, "-o", tmp_path / "g", "--stage", "guidance", "--set", "losses.guidance=3", *online)
    assert code == 0, err
    assert not (tmp_path / "g" / "latents").exists()
    online_record = json.loads((tmp_path / "g" / "train.json").read_text())["material"]["samples"]
    assert online_record["made_from"]["vae"] == made_from["vae"] and online_record["number"] == 6
    assert find_guidance(tmp_path / "g" / "student.safetensors", None) == 3.0
    assert find_guidance(student, None) is None

    quantised = {"conv_in": True, "up_blocks.1.upsamplers.0.phases": True, "conv_out": False}
    QuantisationRecipe(quantised).save(tmp_path / "int8.json")
    settings = ("--set", "optimiser.batch_norm=running", "--set", "optimiser.precision=fp32")
    chosen = ("--stage", "int8", "--int8-recipe", tmp_path / "int8.json", *settings)
    code, out, err = run(capsys, "-o", tmp_path / "q", *chosen, "--student", student, *given)
    assert code == 0, err
    assert out.endswith(f"next: moebius-edge export {tmp_path}/q/student.safetensors --vae {vae} --precision int8 "
                        "--calibration-data DIR --output BUNDLE\n")  # fmt: skip
    blocks = json.loads((tmp_path / "q" / "train.json").read_text())["recipe"]["int8"]["blocks"]
    assert blocks == ["conv_in", "up_blocks.1.upsamplers.0.phases"]
    QuantisationRecipe({"conv_9": False}).save(tmp_path / "int8.json")
    code, _, err = run(capsys, "-o", tmp_path / "q2", *chosen, "--student", student, *given)
    assert code == 2 and "names blocks that the model does not have: conv_9" in err and not (tmp_path / "q2").exists()

    code, _, err = run(capsys, "-o", tmp_path / "s", "--stage", "student", *given)
    assert code == 2 and "holds a run already: add --resume to go on with it" in err
    assert run(capsys, "-o", tmp_path / "s", "--stage", "student", "--resume", *given)[0] == 0


def test_a_pair_that_does_not_fit_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, finished: Path
) -> None:
    wide = replace(STUDENT, block_out_channels=(32, 32, 64))
    save_file(build_student(wide).state_dict(), tmp_path / "student.safetensors")
    arguments = [f"--set=student.{name}={value}" for name, value in wide.to_dict().items()]
    arguments += ["--set=optimiser.steps=1", "--set=losses.distance=teacher", "--device=cpu", "--stage=student"]
    weights = ("--teacher", finished / "teacher_full" / "teacher.safetensors", "--latents", finished / "latents")
    code, _, err = run(capsys, "-o", tmp_path / "run", *arguments, *weights)
    assert code == 2 and "the student's coarsest feature has shape (12, 64, 2, 2), what the teacher has" in err


def test_the_miniature_makes_a_checkpoint_to_export(finished: Path) -> None:
    assert sorted(p.name for p in finished.iterdir()) == [
        "checkpoint", "distilled", "latents", "recipe.json", "student", "teacher", "teacher_full", "vae",
        "vae_finetuned",
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
    assert json.loads((checkpoint / "training.json").read_text())["distilled"]["optimiser"]["steps"] == 2


def test_every_stage_starts_where_the_one_before_it_ended(finished: Path) -> None:
    records = {name: json.loads((finished / name / "train.json").read_text()) for name in ("teacher_full", "distilled")}
    assert records["teacher_full"]["material"]["teacher"]["path"].endswith("/teacher/teacher.safetensors")
    assert records["distilled"]["material"]["teacher"]["path"].endswith("/teacher_full/teacher.safetensors")
    assert records["distilled"]["material"]["student"]["path"].endswith("/student/student.safetensors")
    assert RECIPE.teacher.teacher == TEACHER


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
    for stage in ("train_autoencoder", "encode_latents", "train_stage", "finetune_decoder", "save_checkpoint"):
        monkeypatch.delattr(tiny, stage)
    times = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert train_tiny(finished, RECIPE, OPTIONS, resume=True) == finished / "checkpoint"
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == times
    with pytest.raises(UsageError, match=r"holds a run already: add --resume to go on with it"):
        train_tiny(finished, RECIPE, OPTIONS)


def test_a_lost_checkpoint_is_made_again_from_what_is_left(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    monkeypatch.delattr(tiny, "train_autoencoder")
    monkeypatch.delattr(tiny, "finetune_decoder")
    path = finished / "checkpoint" / "student.safetensors"
    before = path.read_bytes()
    path.unlink()
    (finished / "checkpoint" / "training.json").unlink()
    train_tiny(finished, RECIPE, OPTIONS, resume=True)
    assert path.read_bytes() == before


def test_a_run_of_another_recipe_is_refused(finished: Path) -> None:
    with pytest.raises(UsageError, match=r"run holds a run of another recipe, see recipe.json in it: give another"):
        train_tiny(finished, replace(RECIPE, pictures=4), OPTIONS, resume=True)


def test_a_damaged_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(BundleError, match=r"recipe.json cannot be read .*: give another output folder"):
        train_tiny(tmp_path, RECIPE, OPTIONS)


def test_saving_leaves_the_autoencoder_as_it_was_and_refuses_infinite_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, vae = build_student(STUDENT), build_autoencoder(RECIPE.autoencoder)
    save_file(student.state_dict(), tmp_path / "student.safetensors")
    save_checkpoint(tmp_path / "student.safetensors", vae, RECIPE, tmp_path / "checkpoint")
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    with torch.no_grad():
        student.embedding_layer.weight[0, 0] = 1e5  # beyond float16
    save_file(student.state_dict(), tmp_path / "student.safetensors")
    with pytest.raises(BundleError, match=r"embedding_layer.weight is not finite in float16: lower the recipe's"):
        save_checkpoint(tmp_path / "student.safetensors", vae, RECIPE, tmp_path / "other")
    assert not (tmp_path / "other").exists()
