"""The distilled guidance in a file of weights: written, found again, and refused where it makes no sense."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exporting import save_vae
from safetensors.torch import load_file, save

from moebius_edge.errors import BundleError, MachineError, UsageError
from moebius_edge.export.source import find_source
from moebius_edge.export.weights_metadata import find_guidance, guidance_metadata

WEIGHTS = {"w": torch.arange(3.0)}


def weights(path: Path, metadata: dict[str, str] | None = None) -> Path:
    path.write_bytes(save(WEIGHTS, metadata))
    return path


@pytest.mark.parametrize("guidance", [2, 1.1, 7.5])
def test_what_is_noted_is_found(tmp_path: Path, guidance: float) -> None:
    path = weights(tmp_path / "student.safetensors", guidance_metadata(guidance))
    assert find_guidance(path, None) == find_guidance(path, guidance) == guidance
    assert torch.equal(load_file(path)["w"], WEIGHTS["w"]), "the weights are as without the note"


def test_without_a_note_the_user_may_say(tmp_path: Path) -> None:
    (pickle := tmp_path / "student.bin").write_bytes(b"not opened")
    for path in (pickle, weights(tmp_path / "a.safetensors"), weights(tmp_path / "b.safetensors", {"format": "pt"})):
        assert find_guidance(path, None) is None
        assert find_guidance(path, 2.5) == 2.5


@pytest.mark.parametrize("guidance", [1.0, 0.0, -2.0, float("nan"), float("inf")])
def test_a_guidance_that_cannot_be_distilled(tmp_path: Path, guidance: float) -> None:
    with pytest.raises(UsageError, match=f"distilled guidance is {guidance}: give a number of more than 1"):
        guidance_metadata(guidance)
    with pytest.raises(UsageError, match=f"distilled guidance is {guidance}: give a number of more than 1"):
        find_guidance(tmp_path / "student.bin", guidance)


def test_a_note_is_not_overruled(tmp_path: Path) -> None:
    path = weights(tmp_path / "student.safetensors", guidance_metadata(2.0))
    with pytest.raises(UsageError, match=r"notes guidance 2.0 as distilled, not 3.0: leave --distilled-g"):
        find_guidance(path, 3.0)


@pytest.mark.parametrize("note", ["two", "", "1.0", "nan", "inf", "-3"])
def test_a_note_that_is_no_guidance(tmp_path: Path, note: str) -> None:
    path = weights(tmp_path / "student.safetensors", {"distilled_guidance": note})
    with pytest.raises(BundleError, match=f"notes the distilled_guidance '{note}', not a number of more than 1: copy"):
        find_guidance(path, None)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = weights(tmp_path / "student.safetensors")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(BundleError, match=r"student.safetensors is truncated or no safetensors file .*: copy or"):
        find_guidance(path, None)
    with pytest.raises(MachineError, match=r"none.safetensors cannot be read \(.*\): give a readable file"):
        find_guidance(tmp_path / "none.safetensors", None)


def test_the_source_of_an_export_knows_it(tmp_path: Path) -> None:
    vae = save_vae(tmp_path / "vae")
    path = weights(tmp_path / "student.safetensors", guidance_metadata(2.0))
    assert find_source(path, vae, None).distilled_guidance == 2.0
    assert find_source(weights(path), vae, None).distilled_guidance is None
    assert find_source(path, vae, None, 4.0).distilled_guidance == 4.0
