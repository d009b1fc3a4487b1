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
    "--start prefill": "783cc87b5870376b96655bff4c6487090f4addee4146a7a1c4af4b6fa5afb513",
    "--start noise --seed 3 --preset fast": "bd013760caae329c5c417ce507deccd4f6fc5d7b391fb8e8b88f387c21c0b56a",
    "--scheduler dpm++2m --steps 8 --guidance 3 --guidance-interval 100,800 --raw-colours": (
        "35db7cfa98612c21c776149df761c031319aa5b6b583ea307f0cb86c1a597fcf"
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
