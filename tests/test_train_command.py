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
from safetensors.torch import save_file
from training_toys import STUDENT, small_vae

from moebius_edge import training
from moebius_edge.calibration.recipe import Recipe as QuantisationRecipe
from moebius_edge.cli import main
from moebius_edge.export.weights_metadata import find_guidance
from moebius_edge.model import build_student
from moebius_edge.training import stage

torch.set_num_threads(1)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["train", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "huge"), "there is no preset 'huge': use moebius, tiny"),
        (("--stage", "dream"), "there is no stage 'dream': use teacher, student, guidance, int8"),
        (("--device", "tpu"), "there is no device 'tpu': use auto, cpu, cuda"),
        (("--set", "optimiser.stepz=2"), "recipe: optimiser.stepz is an unknown field: "),
        ((), "there is nothing to train on: add --images SOURCE, or --latents DIR"),
        (("--images", "photos"), "pictures are encoded before a network sees them: add --vae DIR"),
        (("--set", "stage=teacher"), "--set 'stage=teacher' changes the stage: add --stage"),
        (("--stage", "int8"), "stage int8 has to know which blocks will be quantised: add --int8-recipe FILE.json"),
        (("--int8-recipe", "r.json"), "--int8-recipe goes with stage int8: add --stage int8"),
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


def test_a_module_of_ours_that_is_missing_is_no_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moebius_edge.training.stage", None)
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

    monkeypatch.setattr(stage, "train", interrupted)
    code, _, err = run(capsys, "-o", tmp_path)
    assert (code, err) == (130, f"interrupted; add --resume to go on from what lies in {tmp_path}\n")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of pictures, one of them damaged, and an autoencoder."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(5):
        cv2.imwrite(str(folder / f"{number}.png"), rng.integers(0, 256, (70 + number, 90, 3)).astype(np.uint8))
    (folder / "damaged.png").write_bytes(b"no picture")
    vae = tmp_path_factory.mktemp("vae") / "vae"
    small_vae().save_pretrained(vae)
    return folder, vae


def test_the_stages_on_a_folder_of_pictures(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, pictures: tuple[Path, Path]
) -> None:
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
    assert record["inputs"]["teacher"]["path"] == str(teacher) and record["perceptual_distance"] == "teacher"
    made_from = record["inputs"]["samples"]["made_from"]["parts"]
    assert made_from["count"] == 6 and len(made_from["vae"]) == 64

    online = ("--images", images, "--set", "data.cache=false", "--student", student, *common)
    code, _, err = run(capsys, "-o", tmp_path / "g", "--stage", "guidance", "--set", "losses.guidance=3", *online)
    assert code == 0, err
    assert not (tmp_path / "g" / "latents").exists()
    online_record = json.loads((tmp_path / "g" / "train.json").read_text())["inputs"]["samples"]
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
                        "--output BUNDLE\n")  # fmt: skip
    blocks = json.loads((tmp_path / "q" / "train.json").read_text())["recipe"]["int8"]["blocks"]
    assert blocks == ["conv_in", "up_blocks.1.upsamplers.0.phases"]
    QuantisationRecipe({"conv_9": False}).save(tmp_path / "int8.json")
    code, _, err = run(capsys, "-o", tmp_path / "q2", *chosen, "--student", student, *given)
    assert code == 2 and "names blocks that the model does not have: conv_9" in err and not (tmp_path / "q2").exists()

    code, _, err = run(capsys, "-o", tmp_path / "s", "--stage", "student", *given)
    assert code == 2 and "holds a run already: add --resume to go on with it" in err
    assert run(capsys, "-o", tmp_path / "s", "--stage", "student", "--resume", *given)[0] == 0

    wide = replace(STUDENT, block_out_channels=(32, 32, 64))
    save_file(build_student(wide).state_dict(), tmp_path / "student.safetensors")
    settings = [f"--set=student.{name}={value}" for name, value in wide.to_dict().items()]
    code, _, err = run(capsys, "-o", tmp_path / "wide", *common, *settings, "--teacher", teacher, "--latents", latents)
    assert code == 2 and "the student's coarsest feature has shape (2, 64, 2, 2), what the teacher has" in err


def test_a_laptop_tries_training_with_one_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, pictures: tuple[Path, Path]
) -> None:
    """The bundled model's size and autoencoder, the task alone."""
    steps = ("--set", "optimiser.steps=1", "--set", "optimiser.batch=2", "--set", "data.masks_per_picture=2")
    quick = ("--preset", "tiny", "--images", pictures[0], "--device", "cpu", "--sample-every", "0", *steps)
    code, out, err = run(capsys, "-o", tmp_path / "run", *quick)
    assert code == 0, err
    student = tmp_path / "run" / "student.safetensors"
    assert out.startswith(f"saved {student}\nnext: moebius-edge export {student} --vae ")
    teacher = tmp_path / "teacher.bin"
    teacher.touch()
    code, _, err = run(capsys, "-o", tmp_path / "other", *quick, "--teacher", teacher)
    assert code == 2 and "--teacher plays no part in losses.terms ['task']: leave it out" in err
