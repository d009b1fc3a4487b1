"""``moebius-edge export``: from published weights to a bundle. The work is ``moebius_edge.export``'s."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from . import console


def export(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A checkpoint file, or the name 'tiny'.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The bundle's folder, new.")],
    vae: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A diffusers VAE folder; 'tiny' has its own.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="JSON", help="The network's configuration, if not the published."),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=2, max=1000, metavar="N", help="Sampling steps of the gate.")
    ] = 20,
    guidance: Annotated[float, typer.Option(min=0.0, metavar="X", help="Guidance of the gate.")] = 2.0,
    precision: Annotated[str, typer.Option(metavar="fp32|fp16", help="What the network computes in.")] = "fp32",
    min_psnr: Annotated[
        float | None,
        typer.Option("--min-psnr", metavar="DB", help="The gate: below it nothing is saved. By default 60; fp16: 40."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is already there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make a bundle from a checkpoint and its autoencoder.

    A bundle runs without PyTorch. It is saved only if a whole sampling trajectory on ONNX Runtime agrees
    with PyTorch's.
    Exporting itself needs: pip install "moebius-edge[export]"
    """
    from ..export import PRECISIONS, export_bundle

    if precision not in PRECISIONS:
        raise UsageError(f"there is no precision {precision!r}: choose one of {', '.join(PRECISIONS)}")

    with console.progress() as update:

        def tell(stage: str, fraction: float | None) -> None:
            update(stage, round((fraction or 0.0) * 100), 0 if fraction is None else 100)

        try:
            bundle = export_bundle(
                source,
                vae,
                output,
                config=config,
                steps=steps,
                guidance=guidance,
                precision=PRECISIONS[precision],
                min_psnr_db=min_psnr,
                progress=tell,
                force=force,
            )
        except KeyboardInterrupt:
            raise console.Interrupted("interrupted, nothing written") from None
    if as_json:
        console.print_json({"output": str(bundle.path), "gate": bundle.gate, "exit_code": 0})
        return
    total = console.size(bundle.summary()["total_bytes"])
    print(f"saved {bundle.path} ({bundle.resolution}x{bundle.resolution}, {bundle.precision}, {total})")
    for name, value in bundle.gate.items():
        if isinstance(value, float):
            print(f"  {name} {value:.4g}")
    print(f"next: moebius-edge run IMAGE MASK --bundle {bundle.path}")
