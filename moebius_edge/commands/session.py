"""One use of ``run``: a model that is opened once, and one picture after another through it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MachineError
from . import console
from .batch import Job

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle
    from ..pipeline.inpainter import Inpainter, Step


class Session:
    """Use as a context manager. ``settings`` go to ``Inpainter.inpaint``, ``mask_options`` to ``read_mask``. What is
    not in ``settings`` is the ``preset``'s, and what is not in that the bundle's.

    ``timer`` collects the latencies of all pictures. ``bundle`` and ``runtime_info`` are known once the first
    picture was read; ``unusable`` says that the model could not be opened, for which no picture is to blame.
    """

    def __init__(
        self,
        bundle: str,
        runtime: str,
        device: str,
        settings: dict[str, Any],
        mask_options: dict[str, Any],
        preset: str | None = None,
    ) -> None:
        from ..pipeline.latency import StageTimer

        self._wanted = (bundle, runtime, device)
        self._settings, self._mask_options, self._preset = settings, mask_options, preset
        self._stack = ExitStack()
        self._inpainter: Inpainter | None = None
        self.bundle: Bundle | None = None
        self.runtime_info: dict[str, Any] = {}
        self.unusable = False
        self.timer = StageTimer()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._inpainter = None

    def process(self, job: Job, label: str) -> dict[str, Any]:
        """Read, inpaint and write one job, and return its JSON-ready record.

        The picture is read before the model is opened: of two mistakes the cheap one is reported first.
        """
        assert job.mask is not None, "a job without a mask has nothing to process"
        from ..imaging.mask_files import read_mask
        from ..imaging.pictures import check_output, read_picture, write_picture

        with console.progress() as update:
            shown = label

            def on_plan(windows: int, calls: int) -> None:
                nonlocal shown
                if windows > 1:
                    shown = f"{label}, {windows} windows"
                update(shown, 0, calls)

            def on_step(step: Step) -> None:
                update(shown, step.index, step.total)

            update(label, 0, 0)
            with self.timer.measure("read"):
                picture = read_picture(job.image)
                hole, mask_notes = read_mask(job.mask, picture, **self._mask_options)
                check_output(job.output, picture.opaque_in(hole))
            inpainter = self._inpainter or self._open()
            result = inpainter.inpaint(
                picture, hole, on_plan=on_plan, on_step=on_step, timer=self.timer, **self._settings
            )
            self.runtime_info = inpainter.runtime.report()  # a runtime may learn about itself while it runs
            with self.timer.measure("write"):
                _make_folder(job.output.parent)
                written = write_picture(job.output, result.picture)
        return {
            "image": str(job.image),
            "mask": str(job.mask),
            "output": str(job.output),
            "settings": {"preset": self._preset, **result.settings},
            "notes": [*mask_notes, *result.notes, *written],
        }

    def _open(self) -> Inpainter:
        from ..bundle.bundle import Bundle
        from ..pipeline.inpainter import Inpainter
        from ..pipeline.loop import check_cache_interval
        from ..pipeline.presets import preset_notes, preset_settings
        from ..sampling.guidance import check_interval, choose_guidance

        name, runtime, device = self._wanted
        self.unusable = True
        with self.timer.measure("load"):
            self.bundle = Bundle.load(name)
            distilled = self.bundle.distilled_guidance
            choose_guidance(self._settings.get("guidance"), distilled)  # before a long loading
            check_interval(self._settings.get("guidance_interval"), distilled)
            check_cache_interval(self._settings.get("cache_interval", 1), self.bundle)
            made = Inpainter(self.bundle, runtime, device)
            for text in made.runtime.notes:  # before it is opened: an engine may have to be built, for minutes
                console.note(text)
            inpainter = self._stack.enter_context(made)
        self.unusable = False
        self._inpainter = inpainter
        self.runtime_info = inpainter.runtime.report()
        if self._preset is not None:
            for text in preset_notes(self._preset, self._settings, self.bundle):
                console.note(text)
            self._settings |= preset_settings(self._preset, self._settings, self.bundle)
        self._settings = self.bundle.settings(**self._settings)
        return inpainter


def _make_folder(folder: Path) -> None:
    """The results' folder, made for the first of them so that a run without results leaves none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"cannot make folder {folder} ({error.strerror}): name another output") from error
