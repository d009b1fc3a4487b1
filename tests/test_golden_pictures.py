"""The bundled model's fills, to the pixel: a change of these hashes is a change of what every user gets."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import onnxruntime
import pytest
from PIL import Image

from moebius_edge.cli import main

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RECORDED_WITH = "ONNX Runtime 1.32.0 on x86_64 (Intel Xeon with AVX-512)"
GOLDEN = {
    "--start prefill": "690d436ccf7d37ee766d67fb06358887ce403708c0c5fef5861cf46629b3c590",
    "--start noise --seed 3 --preset fast": "63d227fcb6d8e7c4e30a12c58d82f2e906d5aa24307f44a2c2c0dfd0ad534949",
    "--scheduler dpm++2m --steps 8 --guidance 3 --guidance-interval 100,800 --raw-colours": (
        "32f55b61aa459174ae91c954b734f8d71201395e4a321002721998057d40bff8"
    ),
}


@pytest.mark.parametrize("options", GOLDEN)
def test_fills_are_the_recorded_ones(tmp_path: Path, options: str) -> None:
    output = tmp_path / "filled.png"
    pictures = [str(EXAMPLES / name) for name in ("coffee.png", "coffee_mask.png")]
    device = ["--runtime", "onnxruntime", "--device", "cpu"]
    assert main(["run", *pictures, *device, *options.split(), "--output", str(output)]) == 0
    digest = hashlib.sha256(Image.open(output).tobytes()).hexdigest()
    here = f"ONNX Runtime {onnxruntime.__version__} on {platform.machine()}"
    assert digest == GOLDEN[options], (
        f"`run {options}` gives other pixels here ({here}) than were recorded with {RECORDED_WITH}: on the same "
        "runtime and processor that is a change of the product, on others the kernels may round differently"
    )
