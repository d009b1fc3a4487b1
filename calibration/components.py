"""Components of one bundle on several runtimes, such as a candidate's denoiser beside the reference's autoencoder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bundle.bundle import Bundle
from ..runtimes.base import Arrays, Runtime
from ..runtimes.ort import OrtRuntime

AUTOENCODER = ("vae_encoder", "vae_decoder")


def partial_bundle(bundle: Bundle, *names: str, folder: Path | None = None) -> Bundle:
    """``bundle`` with the components ``names`` alone; their files lie in ``folder``, by default the bundle's."""
    return replace(bundle, path=folder or bundle.path, components={name: bundle.components[name] for name in names})


class CombinedRuntime(Runtime):
    """Several runtimes as one, each with components of its own; those that are not active are opened with it."""

    def __init__(self, *runtimes: Runtime) -> None:
        super().__init__({name: c for runtime in runtimes for name, c in runtime.components.items()})
        self._runtimes = runtimes
        self._opened = ExitStack()

    @property
    def info(self) -> dict[str, Any]:
        return self._runtimes[0].info

    def activate(self) -> None:
        for runtime in self._runtimes:
            if not runtime.active:
                self._opened.enter_context(runtime)

    def deactivate(self) -> None:
        self._opened.close()

    def _run(self, component: str, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        (runtime,) = (runtime for runtime in self._runtimes if component in runtime.components)
        return runtime.run(component, feeds, outputs)


class CachedAutoencoder(OrtRuntime):
    """The autoencoder of a bundle, which encodes each picture once."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(partial_bundle(bundle, *AUTOENCODER))
        self._encoded: dict[bytes, Arrays] = {}

    def _run(self, component: str, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        if component != "vae_encoder":
            return super()._run(component, feeds, outputs)
        key = hashlib.sha256(feeds["image"].tobytes()).digest()
        if key not in self._encoded:
            self._encoded[key] = super()._run(component, feeds, outputs)
        return self._encoded[key]
