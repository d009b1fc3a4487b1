"""Stage ``int8``: a student is trained under its own float copy, goes on after an interruption, and stays a student."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_toys import OPTIONS, RECIPE, STUDENT, FlatLatents, material

from moebius_edge.errors import UsageError
from moebius_edge.export.weights_metadata import find_guidance, guidance_metadata
from moebius_edge.model import build_student, load_checkpoint
from moebius_edge.training.batch_norms import batch_norms
from moebius_edge.training.checkpoints import checkpoint_files
from moebius_edge.training.recipe import Int8Recipe, Recipe, with_values
from moebius_edge.training.stage import train_stage

torch.set_num_threads(1)
LAMBDA = "up_blocks.0.attentions.0.attn1.lambda"
BLOCKS = ("conv_in", "down_blocks.0.attentions.0.ff", "up_blocks.0.attentions.0.proj_in", LAMBDA)
INT8 = replace(
    RECIPE,
    stage="int8",
    optimiser=replace(RECIPE.optimiser, batch_norm="running"),
    int8=Int8Recipe(blocks=BLOCKS, range_batches=2),
)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of random weights that notes a distilled guidance."""
    torch.manual_seed(3)
    network = build_student(STUDENT)
    for norm in batch_norms(network):
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    save_file(network.state_dict(), path, guidance_metadata(3.0))
    return path


def test_the_stage_from_file_to_file(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train_stage(INT8, material(student=student), tmp_path, OPTIONS)
    assert (
        f"1 blocks of the recipe train in floating point, for training does not simulate the products inside "
        f"lambda operators: {LAMBDA}\n" in capsys.readouterr().err
    )
    before, after = load_file(student), load_file(result)
    load_checkpoint(build_student(STUDENT), result)
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert not any("running_" in name or "num_batches" in name for name in moved)
    assert {n for n, _ in build_student(STUDENT).named_parameters() if n.endswith("weight")} - moved == set()
    assert find_guidance(result, None) == 3.0  # it still needs one branch

    record = json.loads((tmp_path / "train.json").read_text())
    assert record["int8"]["left_in_floating_point"] == [LAMBDA]
    ff = "down_blocks.0.attentions.0.transformer_blocks.0.ff"
    assert list(record["int8"]["scales"]) == [
        "conv_in.conv_pw",
        f"{ff}.inverted_conv.conv",
        f"{ff}.point_conv.conv",
        "up_blocks.0.attentions.0.proj_in",
    ]
    assert all(scale > 0 for scale in record["int8"]["scales"].values())
    assert {"loss", "int8", "task"} <= record["result"]["last_figures"].keys()


def test_a_stopped_run_goes_on_exactly(student: Path, tmp_path: Path) -> None:
    ours = material(student=student)
    whole = load_file(train_stage(INT8, ours, tmp_path / "whole", OPTIONS))

    class Stopped(FlatLatents):
        drawn = 0

        def latents(self, drawn: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            self.drawn += 1
            if self.drawn > INT8.int8.range_batches + 3:
                raise KeyboardInterrupt
            return drawn

    with pytest.raises(KeyboardInterrupt):
        train_stage(INT8, replace(ours, source=Stopped()), tmp_path / "cut", OPTIONS)
    assert [p.name for p in checkpoint_files(tmp_path / "cut")] == ["step-000000002.pt"]
    resumed = load_file(train_stage(INT8, ours, tmp_path / "cut", OPTIONS, resume=True))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    with pytest.raises(
        UsageError, match=r"another recipe \(int8.blocks is \['conv_in', .* there, \['conv_in'\] here\)"
    ):
        other = replace(INT8, int8=replace(INT8.int8, blocks=("conv_in",)))
        train_stage(other, ours, tmp_path / "cut", OPTIONS, resume=True)


def test_recipes_that_make_no_sense_are_refused(student: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"optimiser.batch_norm is 'batch': stage int8 trains what export folds"):
        replace(INT8, optimiser=replace(INT8.optimiser, batch_norm="batch"))
    with pytest.raises(UsageError, match=r"optimiser.precision is 'bf16', too coarse to tell INT8 steps: use fp32"):
        replace(INT8, optimiser=replace(INT8.optimiser, precision="bf16"))
    with pytest.raises(UsageError, match=r"int8.ranges is 'best': use minmax, percentile, entropy, mse"):
        replace(INT8, int8=Int8Recipe(ranges="best"))
    with pytest.raises(UsageError, match=r"int8.range_batches is 0: give 1 or more"):
        replace(INT8, int8=Int8Recipe(range_batches=0))
    with pytest.raises(UsageError, match="stage int8 starts from a trained student: add --student FILE"):
        train_stage(INT8, material(), tmp_path / "none", OPTIONS)
    with pytest.raises(UsageError, match="names blocks that the model does not have: conv_9: remove them"):
        unknown = replace(INT8, int8=Int8Recipe(blocks=("conv_9",)))
        train_stage(unknown, material(student=student), tmp_path / "unknown", OPTIONS)


def test_blocks_are_part_of_the_recipe_s_text() -> None:
    assert with_values(Recipe(), {"int8": {"blocks": ["a", "b"]}}).int8.blocks == ("a", "b")
    with pytest.raises(UsageError, match="int8.blocks is 1: give a text, such as ''"):
        with_values(Recipe(), {"int8": {"blocks": [1]}})
