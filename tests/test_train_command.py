"""``moebius-edge train``: mistakes and their exit codes, and the stages on a user's pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from commanding import Captured, refused
from diffusers import AutoencoderKL

from moebius_edge import training
from moebius_edge.calibration.blocks import Recipe as QuantisationRecipe
from moebius_edge.checkpoints.weights_metadata import find_guidance
from moebius_edge.cli import main
from moebius_edge.commands import train as command_module

torch.set_num_threads(1)
TINY = ("train", "--preset", "tiny", "--device", "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--preset huge", "'huge' is not one of 'tiny', 'moebius', 'upstream'"),
        ("--stage all", "'all' is not one of 'teacher', 'student', 'guidance', 'int8'"),
        ("--device tpu", "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        ("--keep 0", "Invalid value for '--keep'"),
        ("--set optimiser.stepz=2", "optimiser.stepz"),
        ("", "there is nothing to train on: add --images SOURCE, your pictures"),
        ("--preset upstream --stage teacher", "--preset upstream has no stage teacher"),
        ("--set stage=teacher", "--set 'stage=teacher' changes the stage: add --stage teacher instead"),
        ("--stage int8", "stage int8 has to know which blocks will be quantised: add --int8-recipe FILE.json"),
        ("--int8-recipe r.json", "--int8-recipe goes with stage int8: add --stage int8"),
    ],
)
def test_mistakes_are_usage_errors(capsys: Captured, tmp_path: Path, arguments: str, message: str) -> None:
    refused(capsys, 2, message, "train", "-o", tmp_path / "run", *arguments.split())
    assert not (tmp_path / "run" / "train.json").exists()


def test_what_is_not_there_is_named(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (*TINY, "-o", tmp_path / "run", "--images", tmp_path)
    refused(capsys, 3, "there is no checkpoint", *asked, "--teacher", tmp_path / "no.bin")
    refused(capsys, 3, "no", *asked, "--vae", tmp_path / "no")
    refused(capsys, 3, "no.toml cannot be read", *asked, "--config", tmp_path / "no.toml")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(capsys, 3, "PyTorch finds no CUDA GPU here: use --device cpu", *asked, "--device", "cuda")
    assert not (tmp_path / "run" / "samples").exists()


@pytest.mark.parametrize("package", ["diffusers", "accelerate"])
def test_a_missing_package_is_named(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for name in [m for m in sys.modules if m.startswith("moebius_edge.training.")]:
        short = name.rpartition(".")[2]
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(training, short, getattr(training, short))  # so that the package's attribute comes back too
    install = f'training needs {package}: run `pip install "moebius-edge[train]"`'
    refused(capsys, 3, install, "train", "-o", tmp_path / "run", "--images", tmp_path)


def test_an_interruption_says_how_to_go_on(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: Any) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_module, "_recipe", interrupted)
    assert main([*TINY, "-o", str(tmp_path)]) == 130
    assert capsys.readouterr().err == f"interrupted; add --resume to go on from what lies in {tmp_path}\n"


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of pictures, one of them damaged, and an autoencoder."""
    images, vae = tmp_path / "pictures", tmp_path / "vae"
    images.mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        cv2.imwrite(str(images / f"{number}.png"), rng.integers(0, 256, (70 + number, 90, 3)).astype(np.uint8))
    (images / "damaged.png").write_bytes(b"no picture")
    torch.manual_seed(0)
    levels = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 8, 8, 8),
    }
    AutoencoderKL(**levels, latent_channels=4, norm_num_groups=4, scaling_factor=1.0).save_pretrained(vae)
    return images, vae


CONFIG = """
[student]
block_out_channels = [32, 32, 32]
num_heads = 4
cross_attention_dim = 16
prompt_embedding_dim = 16
latent_size = 8
layers_per_block = 1
window = 5
[teacher]
block_out_channels = [32, 32, 32, 32]
num_heads = 4
cross_attention_dim = 16
prompt_embedding_dim = 16
layers_per_block = 1
gate_rank = 4
[losses]
distance = "teacher"
[optimiser]
steps = 2
batch = 2
"""


def test_the_stages_on_a_folder_of_pictures(capsys: Captured, tmp_path: Path, pictures: tuple[Path, Path]) -> None:
    images, vae = pictures
    config = tmp_path / "small.toml"
    config.write_text(CONFIG)

    def trained(folder: str, stage: str, *options: str | Path) -> tuple[str, dict[str, Any]]:
        """What a stage says, and its record; everything that is printed of the last line comes first."""
        common = ("--config", config, "--vae", vae, "--device", "cpu", "--sample-every", "0")
        arguments = ("train", "-o", tmp_path / folder, "--stage", stage, *common, *options)
        assert main(list(map(str, arguments))) == 0, capsys.readouterr().err
        out, err = capsys.readouterr()
        return out + err, json.loads((tmp_path / folder / "train.json").read_text())

    said, _ = trained("t", "teacher", "--images", images)
    assert f"saved {tmp_path}/t/teacher.safetensors\n" in said and "next:" not in said
    assert f"1 picture could not be read: see {tmp_path}/t/unreadable.txt" in said
    assert (tmp_path / "t" / "unreadable.txt").read_text().startswith("damaged.png\t")

    shown = [line for line in said.splitlines() if line.startswith("teacher  loss ")]
    assert "training on cpu, 1 process\n" in said and shown[-1].endswith(": 2 of 2")  # the last step, in a log too
    teacher, student = tmp_path / "t" / "teacher.safetensors", tmp_path / "s" / "student.safetensors"
    given = ("--teacher", teacher, "--images", images)
    said, record = trained("s", "student", *given, "--sample-every", "2")
    assert f"next: moebius-edge export {student} --vae {vae} --output BUNDLE\n" in said
    grid = cv2.imread(str(tmp_path / "s" / "samples" / "step-000000002.png"))
    assert grid is not None and grid.shape == (4 * 64, 3 * 64, 3)
    assert str(teacher) in json.dumps(record) and record["perceptual_distance"] == "teacher"

    trained("g", "guidance", "--set", "losses.guidance=3", "--images", images, "--student", student)
    assert find_guidance(tmp_path / "g" / "student.safetensors", None) == 3.0
    assert find_guidance(student, None) is None

    hole = np.zeros((70, 90), np.uint8)
    hole[20:50, 30:60] = 255
    cv2.imwrite(str(images / "hole.png"), hole)
    lines = ({"image": "0.png", "mask": "hole.png", "prompt": "foreground"}, {"image": "1.png", "prompt": "background"})
    (images / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prompted = ("--preset", "upstream", "--teacher", teacher, "--images", images / "list.jsonl")
    _, record = trained("u", "student", *prompted)
    assert record["recipe"]["optimiser"]["muon"] == "all" and record["recipe"]["data"]["posterior"] == "sample"
    (images / "hole.png").unlink()

    recipe = tmp_path / "int8.json"
    QuantisationRecipe({"conv_in": True, "up_blocks.1.upsamplers.0.phases": True, "conv_out": False}).save(recipe)
    settings = ("--set", "optimiser.batch_norm=running", "--set", "optimiser.precision=fp32")
    chosen = ("--int8-recipe", recipe, "--student", student, *settings, *given)
    said, record = trained("q", "int8", *chosen)
    assert f"/q/student.safetensors --vae {vae} --precision int8 --calibration-data DIR --output BUNDLE\n" in said
    assert record["recipe"]["int8"]["blocks"] == ["conv_in", "up_blocks.1.upsamplers.0.phases"]
    QuantisationRecipe({"conv_9": False}).save(recipe)
    asked = ("train", "--config", config, "--vae", vae, "--device", "cpu", "-o", tmp_path / "q2", "--stage", "int8")
    refused(capsys, 2, "names blocks that the model does not have: conv_9", *asked, *chosen)
    assert not (tmp_path / "q2").exists()

    again = ("train", "-o", tmp_path / "s", "--config", config, "--vae", vae, "--device", "cpu", *given)
    refused(capsys, 2, "holds a run already: add --resume to go on with it", *again)
    (images / "0.png").rename(tmp_path / "0.png")
    refused(capsys, 2, "holds a run on other samples (pictures.number is 6 there, 5 here)", *again, "--resume")
    (tmp_path / "0.png").rename(images / "0.png")
    assert main([*map(str, again), "--resume"]) == 0
