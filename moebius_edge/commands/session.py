"""A model that is opened once, and one picture after another through it: what ``run`` does after its options are read.

In a folder other threads read the next pictures and write the last results meanwhile, so that the device need not wait
for files; the device itself is used by the calling thread alone. ``run.jsonl`` among the results says of each what it
was made from, so that the same command goes on where it was ended.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import BundleError, MachineError, MoebiusError, UsageError
from . import console
from .pairs import Job, check_replaceable

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle
    from ..imaging.masks import Mask
    from ..imaging.picture import Picture
    from ..pipeline.inpainter import Inpainter, Result, Step
    from ..progress import Progress
    from ..system.fingerprint import ResultLog

LOG = "run.jsonl"  # in a folder of results
Record = dict[str, Any]  # what became of one job, ready for JSON


class Source(NamedTuple):
    """The files of a job in memory; ``facts`` is what its result follows from, None where that is not known."""

    picture: Picture
    hole: Mask
    notes: Sequence[str]
    facts: dict[str, Any] | None


class _Here(Executor):
    """Executes what it is given at once, in the calling thread."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        outcome: Future[Any] = Future()
        try:
            outcome.set_result(function(*arguments, **options))
        except MoebiusError as error:
            outcome.set_exception(error)
        return outcome


@dataclass
class Session:
    """A model that is opened once, and one picture after another through it. Use as a context manager.

    ``settings`` go to ``Inpainter.inpaint``; what is not among them is the ``preset``'s, and what is not in that the
    bundle's. ``mask_options`` go to ``read_mask``. ``results`` is the folder of a batch, for which ``threads`` pictures
    are read ahead and as many results written at a time. ``timer`` collects the latencies of all pictures. ``bundle``
    and ``runtime_info`` are known once the first picture was read.
    """

    model: tuple[str, str, str]
    settings: dict[str, Any]
    mask_options: dict[str, Any]
    preset: str | None
    results: Path | None
    threads: int
    force: bool
    records: list[Record] = field(default_factory=list)
    bundle: Bundle | None = None
    runtime_info: dict[str, Any] = field(default_factory=dict)
    span: list[float] = field(default_factory=lambda: [0.0, 0.0])  # seconds: the model was open, the last result saved
    _inpainter: Inpainter | None = None
    _opening: bool = False  # and if that fails, no picture is to blame
    _log: ResultLog | None = None  # of a batch
    _pending: deque[tuple[Job, Future[Record]]] = field(default_factory=deque)  # filled, and perhaps not yet saved

    @property
    def batch(self) -> bool:
        return self.results is not None

    def __enter__(self) -> Session:
        from concurrent.futures import ThreadPoolExecutor

        from ..pipeline.latency import StageTimer

        self.timer = StageTimer()
        self._readers, self._writers = (ThreadPoolExecutor(self.threads) if self.batch else _Here() for _ in range(2))
        return self

    def __exit__(self, *error: object) -> None:
        self._readers.shutdown(cancel_futures=True)
        self._writers.shutdown()  # what was filled is saved, in an interrupted run too
        self.records += [outcome.result() for _, outcome in self._pending if not outcome.exception()]
        if self._inpainter is not None:
            self._inpainter.close()

    def process(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Record]]:
        """Read, inpaint and write every job that is not done, and yield each with its record, in order.

        In a batch a bad pair becomes a record with its error; a bad model is bad for all and ends the run. A picture
        is read before the model is opened: of two mistakes the cheap one is reported first.
        """
        before = {} if self.results is None else self._done_before(jobs, self.results)
        self.records += before.values()
        ahead = self._read_ahead([job for job in jobs if job not in before])
        for number, (job, reading) in enumerate(ahead, start=len(before) + 1):
            what = f"[{number}/{len(jobs)}] {job.name}" if self.batch else job.name
            try:
                with console.progress() as on_progress:
                    on_progress(what, 0, 0)
                    source = reading.result()
                    inpainter, started = self._inpainter or self._open(), time.perf_counter()

                    def on_step(step: Step, what: str = what, on_progress: Progress = on_progress) -> None:
                        on_progress(what, step.index, step.total)

                    result = inpainter.inpaint(
                        source.picture, source.hole, on_step=on_step, timer=self.timer, **self.settings
                    )
                inpaint_ms = round((time.perf_counter() - started) * 1e3, 1)
                self.runtime_info = inpainter.runtime.report()  # a runtime may learn about itself while it runs
                outcome = self._writers.submit(self._write, job, source, result, inpaint_ms)
            except MoebiusError as error:
                if self._opening:
                    raise
                outcome = Future()
                outcome.set_exception(error)
            self._pending.append((job, outcome))
            yield from self._finished(self.threads)
        yield from self._finished(0)
        order = {str(job.image): index for index, job in enumerate(jobs)}
        self.records.sort(key=lambda record: order[record["image"]])

    def _done_before(self, jobs: Sequence[Job], results: Path) -> dict[Job, Record]:
        """The records of those ``jobs`` that an earlier run has done, from files and settings that are the same."""
        from ..system.fingerprint import ResultLog

        self._load()
        self._log, before = ResultLog(results / LOG), {}
        for job in () if self.force else jobs:
            line = self._log.get(self._result_name(job), self._facts(job))
            if line is not None and not job.problem and _size(job.output) == line["bytes"]:
                record = {name: value for name, value in line.items() if name not in ("name", "fingerprint", "bytes")}
                before[job] = {**record, **_inputs(job), "output": str(job.output), "done_before": True}
        if before:
            count = f"{len(before)} of {len(jobs)} pictures were done before with the same settings"
            console.note(f"{count}, says {self._log.path}: --force fills them again")
        return before

    def _facts(self, job: Job) -> dict[str, Any] | None:
        """What the result of ``job`` follows from; a file counts as the same if its size and its time are."""
        from .. import __version__

        if self.bundle is None or job.mask is None:
            return None
        try:
            files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in (job.image, job.mask)]
        except OSError:
            return None
        digests = {name: record["sha256"] for name, record in self.bundle.files.items()}
        model = {"version": __version__, "bundle": digests, "runtime": self.model[1:]}
        return {**model, "settings": self.settings, "mask": self.mask_options, "files": files}

    def _result_name(self, job: Job) -> str:
        return str(job.output.relative_to(self.results or "."))

    def _read_ahead(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Future[Source]]]:
        """Each job with its source, or what comes to be that; of a batch, with ``threads`` after it being read."""
        from ..imaging import mask_files, pictures  # noqa: F401  # here, so that no two threads import them at once

        ahead: deque[tuple[Job, Future[Source]]] = deque()
        for job in jobs:
            ahead.append((job, self._readers.submit(self._read, job)))
            if len(ahead) > self.threads or not self.batch:
                yield ahead.popleft()
        yield from ahead

    def _read(self, job: Job) -> Source:
        from ..imaging.mask_files import read_mask
        from ..imaging.pictures import check_output, read_picture

        if job.problem or job.mask is None:
            raise UsageError(job.problem)
        check_replaceable(job.output)
        facts = self._facts(job)
        with self.timer.measure("read"):
            picture = read_picture(job.image)
            hole, notes = read_mask(job.mask, picture, **self.mask_options)
            check_output(job.output, picture.opaque_in(hole))
        return Source(picture, hole, notes, facts)

    def _write(self, job: Job, source: Source, result: Result, inpaint_ms: float) -> Record:
        """Write a result, and the line of the log after it: a kill in between costs the picture's time alone."""
        from ..imaging.pictures import write_picture

        with self.timer.measure("write"):
            _make_folder(job.output.parent)
            written = write_picture(job.output, result.picture)
        notes, settings = [*source.notes, *result.notes, *written], {"preset": self.preset, **result.settings}
        record = {**_inputs(job), "output": str(job.output), "settings": settings, "notes": notes}
        record["inpaint_ms"] = inpaint_ms
        if self._log is not None:
            self._log.add(self._result_name(job), source.facts, {**record, "bytes": job.output.stat().st_size})
        self.span[1] = time.perf_counter()
        return record

    def _finished(self, most: int) -> Iterator[tuple[Job, Record]]:
        """Jobs that are done, in order, until at most ``most`` results are still to be saved."""
        while self._pending and (len(self._pending) > most or self._pending[0][1].done()):
            job, outcome = self._pending[0]
            try:
                record = outcome.result()
            except MoebiusError as error:
                if self._log is None or isinstance(error, BundleError):
                    raise
                record = {**_inputs(job), "error": str(error), "exit_code": error.exit_code}
                self._log.add(self._result_name(job), None, record)
            self._pending.popleft()
            self.records.append(record)
            yield job, record

    def _load(self) -> Bundle:
        """The bundle, read and with its settings, once."""
        from ..bundle.bundle import Bundle
        from ..pipeline.loop import check_cache_interval
        from ..pipeline.presets import preset_notes, preset_settings
        from ..sampling.guidance import check_interval, choose_guidance

        if self.bundle is None:
            bundle = Bundle.load(self.model[0], verify=False)  # of a gigabyte, which an engine does not read
            choose_guidance(self.settings.get("guidance"), bundle.distilled_guidance)  # before a long loading
            check_interval(self.settings.get("guidance_interval"), bundle.distilled_guidance)
            check_cache_interval(self.settings.get("cache_interval", 1), bundle)
            if self.preset is not None:
                for text in preset_notes(self.preset, self.settings, bundle):
                    console.note(text)
                self.settings |= preset_settings(self.preset, self.settings, bundle)
            self.settings, self.bundle = bundle.settings(**self.settings), bundle
        return self.bundle

    def _open(self) -> Inpainter:
        from ..pipeline.inpainter import Inpainter

        self._opening = True
        with self.timer.measure("load"):
            bundle = self._load()
            inpainter = Inpainter(bundle, *self.model[1:])
            if inpainter.runtime.executes_onnx:
                bundle.verify()
            notes = list(inpainter.runtime.notes)
            for text in notes:  # before it is opened: an engine may have to be built, for minutes
                console.note(text)
            self._inpainter = inpainter.__enter__()
            for text in inpainter.runtime.notes[len(notes) :]:
                console.note(text)
        self._opening = False
        self.span[0] = time.perf_counter()
        return inpainter

    def done(self) -> list[Record]:
        """The records of all pictures whose results are there."""
        return [record for record in self.records if "error" not in record]

    def state(self, jobs: int) -> str:
        """What an interrupted run has done."""
        if not self.batch:
            return "nothing written"
        return f"{len(self.done())} of {jobs} done: the same command goes on from there"


def _inputs(job: Job) -> Record:
    return {"image": str(job.image), "mask": None if job.mask is None else str(job.mask)}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _make_folder(folder: Path) -> None:
    """The results' folder, made for the first of them so that a run without results leaves none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"cannot make folder {folder} ({error.strerror})", "name another output") from error
