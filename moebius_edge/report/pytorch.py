"""The PyTorch reference of a bundle: the checkpoint it was made from, on the torch runtime.

The one module of the report that needs the `export` extra; it is imported when such a row is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MachineError
from ..runtimes import Runtime

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle


def open_checkpoint(checkpoint: Path, vae: Path, bundle: Bundle) -> Runtime:
    """The networks in float32 on the CPU, for the resolution of ``bundle``.

    Raises:
        MachineError: PyTorch or diffusers is missing. UsageError, BundleError: the files are no such networks.
    """
    try:
        from ..export.source import find_source, load_config, load_student, load_vae
        from ..runtimes.pytorch import TorchRuntime

        source = find_source(checkpoint, vae, None)
        student = load_student(source, load_config(source))
        return TorchRuntime(student, load_vae(source), bundle.components)
    except ModuleNotFoundError as error:
        raise MachineError(f'the PyTorch reference needs {error.name}: pip install "moebius-edge[export]"') from error
