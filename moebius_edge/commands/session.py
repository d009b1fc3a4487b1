"""A model that is opened once, and one picture after another through it: what ``run`` does after its options are read.

In a folder several pictures are in work, each in a thread of its own that reads, cuts windows, pastes and writes; the
networks alone are run by the calling thread, one picture's at a time, so that the device waits for nothing else.
``run.jsonl`` among the results says of each what it was made from, so that the same command goes on where it was ended.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import BundleError, MachineError, MoebiusError, UsageError
from ..progress import Progress, no_progress
from . import console
from .pairs import Job, check_replaceable

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle
    from ..imaging.masks import Mask
    from ..imaging.picture import Picture
    from ..pipeline.inpainter import Inpainter, Result, Step
    from ..pipeline.latency import StageTimer
    from ..system.fingerprint import ResultLog

LOG = "run.jsonl"  # in a folder of results
Record = dict[str, Any]  # what became of one job, ready for JSON


class Source(NamedTuple):
    """The files of a job in memory; ``facts`` is what its result follows from, None where that is not known."""

    picture: Picture
    hole: Mask
    notes: Sequence[str]
    facts: dict[str, Any] | None


class _Task(NamedTuple):
    """What a thread asks the calling one to do, since when, for whose latencies, and where the outcome goes."""

    work: Callable[[], Any]
    posted: float
    timer: StageTimer
    outcome: Future[Any]


@dataclass
class Session:
    """A model that is opened once, and one picture after another through it. Use as a context manager.

    ``settings`` go to ``Inpainter.inpaint``; what is not among them is the ``preset``'s, and what is not in that the
    bundle's. ``mask_options`` go to ``read_mask``. ``results`` is the folder of a batch, of which ``threads`` pictures
    are in work at a time. ``timer`` collects the latencies of all pictures. ``bundle`` and ``runtime_info`` are known
    once the first picture was read.
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
    _tasks: SimpleQueue[_Task | None] = field(default_factory=SimpleQueue)  # None: a job has ended
    _running: deque[tuple[Job, Future[Record]]] = field(default_factory=deque)  # in the order of their records
    _on_progress: Progress = no_progress
    _closed: bool = False

    @property
    def batch(self) -> bool:
        return self.results is not None

    def __enter__(self) -> Session:
        from concurrent.futures import ThreadPoolExecutor

        from ..pipeline.latency import StageTimer

        self.timer = StageTimer()
        self._pool = ThreadPoolExecutor(self.threads)
        return self

    def __exit__(self, *error: object) -> None:
        """Of an interrupted folder what is being written is written, and the rest given up."""
        self._closed = True
        self._pool.shutdown(cancel_futures=True)
        whole = [outcome for _, outcome in self._running if not outcome.cancelled() and not outcome.exception()]
        self.records += [outcome.result() for outcome in whole]
        if self._inpainter is not None:
            self._inpainter.close()

    def process(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Record]]:
        """Read, inpaint and write every job that is not done, and yield each with its record, in order.

        In a batch a bad pair becomes a record with its error; a bad model is bad for all and ends the run. A picture
        is read before the model is opened: of two mistakes the cheap one is reported first.
        """
        from ..pipeline.latency import StageTimer

        if self.results is not None:
            yield from self._process_folder(jobs, self.results)
            return
        for job in jobs:
            with console.progress() as self._on_progress:
                self._on_progress(job.name, 0, 0)
                timer, on_step = StageTimer(), partial(self._step, job.name)
                source, inpainter = self._read(job, timer), self._open()
                result = inpainter.inpaint(source.picture, source.hole, on_step=on_step, timer=timer, **self.settings)
                record = self._write(job, source, result, timer)
            self._keep(record)
            yield job, record

    def _process_folder(self, jobs: Sequence[Job], results: Path) -> Iterator[tuple[Job, Record]]:
        from ..imaging import mask_files, pictures  # noqa: F401  # here, so that no two threads import them at once

        before = self._done_before(jobs, results)
        self.records += before.values()
        for number, job in enumerate((job for job in jobs if job not in before), start=len(before) + 1):
            outcome = self._pool.submit(self._work, job, f"[{number}/{len(jobs)}] {job.name}")
            self._running.append((job, outcome))
            outcome.add_done_callback(lambda outcome: self._tasks.put(None))
        while self._running:
            job, outcome = self._running[0]
            with console.progress() as self._on_progress:
                while not outcome.done():
                    if (task := self._tasks.get()) is not None:
                        self._execute(task)
            try:
                record = outcome.result()
            except MoebiusError as error:
                if self._log is None or isinstance(error, BundleError):
                    raise
                record = {**_inputs(job), "error": str(error), "exit_code": error.exit_code}
                self._log.add(self._result_name(job), None, record)
            self._running.popleft()
            self._keep(record)
            yield job, record
        order = {str(job.image): index for index, job in enumerate(jobs)}
        self.records.sort(key=lambda record: order[record["image"]])

    def _keep(self, record: Record) -> None:
        self.records.append(record)
        if self._inpainter is not None:
            self.runtime_info = self._inpainter.runtime.report()  # a runtime may learn about itself while it runs

    def _work(self, job: Job, what: str) -> Record:
        """One job of a folder, in a thread of its own."""
        from ..pipeline.latency import StageTimer
        from ..pipeline.loop import fill

        timer = StageTimer()
        source = self._read(job, timer)
        inpainter = copy(self._ask(timer, self._begin, what))  # for its own ``fill``; the runtime is shared
        inpainter.fill = partial(self._ask, timer, fill)
        result = inpainter.inpaint(
            source.picture, source.hole, on_step=partial(self._step, what), timer=timer, **self.settings
        )
        return self._write(job, source, result, timer)

    def _ask(self, timer: StageTimer, function: Callable[..., Any], *arguments: Any) -> Any:
        """What ``function`` returns or raises in the calling thread of ``process``, which owns the device."""
        outcome: Future[Any] = Future()
        self._tasks.put(_Task(partial(function, *arguments), time.perf_counter(), timer, outcome))
        while not wait([outcome], timeout=0.1).done:
            if self._closed:  # nobody will ever do it
                raise CancelledError
        return outcome.result()

    def _execute(self, task: _Task) -> None:
        task.timer.leave_out(time.perf_counter() - task.posted)
        try:
            task.outcome.set_result(task.work())
        except BaseException as error:
            task.outcome.set_exception(error)
            if self._opening or not isinstance(error, MoebiusError):
                raise

    def _begin(self, what: str) -> Inpainter:
        self._on_progress(what, 0, 0)
        return self._open()

    def _step(self, what: str, step: Step) -> None:
        self._on_progress(what, step.index, step.total)

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

    def _read(self, job: Job, timer: StageTimer) -> Source:
        from ..imaging.mask_files import read_mask
        from ..imaging.pictures import check_output, read_picture

        if job.problem or job.mask is None:
            raise UsageError(job.problem)
        check_replaceable(job.output)
        facts = self._facts(job)
        with timer.measure("read"):
            picture = read_picture(job.image)
            hole, notes = read_mask(job.mask, picture, **self.mask_options)
            check_output(job.output, picture.opaque_in(hole))
        return Source(picture, hole, notes, facts)

    def _write(self, job: Job, source: Source, result: Result, timer: StageTimer) -> Record:
        """Write a result, and the line of the log after it: a kill in between costs the picture's time alone."""
        from ..imaging.pictures import write_picture

        with timer.measure("write"):
            _make_folder(job.output.parent)
            written = write_picture(job.output, result.picture)
        self.timer.merge(timer)
        notes, settings = [*source.notes, *result.notes, *written], {"preset": self.preset, **result.settings}
        record = {**_inputs(job), "output": str(job.output), "settings": settings, "notes": notes}
        record["latency_ms"] = timer.totals_ms()
        if self._log is not None:
            self._log.add(self._result_name(job), source.facts, {**record, "bytes": job.output.stat().st_size})
        self.span[1] = time.perf_counter()
        return record

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

        if self._inpainter is not None:
            return self._inpainter
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
