"""The queue before the device, and the process behind it: fed, watched, ended and started anew.

All of it belongs to one event loop, so that nothing needs a lock; only the connection to the process is read and
written by threads of its own, since the process may have stopped to read.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ..errors import MoebiusError
from ..system.subprocess_job import ProcessFailed, cause_of_death
from . import worker

Event = tuple[str, dict[str, Any]]  # a name and its values; the last of a job is ``result`` or ``error``
Model = tuple[str, str, str]  # bundle, runtime, device
_END_S = 10.0  # how long an idle process may take to end


class Refused(Exception):
    """A request that is not worked on: the HTTP status, and what the answer says."""

    def __init__(self, status: int, problem: str, remedy: str, retry_after_s: int | None = None) -> None:
        super().__init__(problem)
        self.status, self.problem, self.remedy, self.retry_after_s = status, problem, remedy, retry_after_s


class Job:
    """An order and what has become of it."""

    def __init__(self, order: worker.Order, deadline_s: float) -> None:
        self.order, self.begun = order, time.monotonic()
        self.deadline = self.begun + deadline_s
        self.queue_ms = 0.0
        self.started = self.stopped = False
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, name: str, values: dict[str, Any]) -> None:
        if name == "started":
            self.started, self.queue_ms = True, (time.monotonic() - self.begun) * 1e3
        elif name == "result":
            values["timing"]["queue_ms"] = round(self.queue_ms, 3)
        if name not in ("started", "stopped"):
            self._events.put_nowait((name, values))

    def fail(self, status: int, problem: str, remedy: str) -> None:
        self.put("error", {"status": status, "problem": problem, "remedy": remedy})

    async def next(self, most_s: float = float("inf")) -> Event | None:
        """The next event; None after ``most_s`` seconds without one. Past the deadline it is an ``error``."""
        left = self.deadline - time.monotonic()
        try:
            return await asyncio.wait_for(self._events.get(), max(0.0, min(left, most_s)))
        except asyncio.TimeoutError:
            if most_s < left:
                return None
        seconds = self.deadline - self.begun
        problem = f"the picture took more than the {seconds:g} seconds that a request may take"
        return "error", {"status": 504, "problem": problem, "remedy": "use fewer steps, preset fast or a smaller mask"}


class _Process:
    """The worker process and the connection to it."""

    def __init__(self, model: Model) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy this process's threads' locks
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=worker.main, args=(theirs, model), daemon=True)
        self.process.start()
        theirs.close()
        self.facts: dict[str, Any] = {}
        self._reader, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    async def receive(self) -> tuple[int, str, dict[str, Any]] | None:
        """The next event of the process, None once it has died."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reader, self.connection.recv)
        except (EOFError, OSError):
            return None

    def send(self, message: worker.Order | int | None) -> None:
        self._writer.submit(self.connection.send, message)  # to a dead process it fails, which ``receive`` tells

    async def cause_of_death(self) -> str:
        await asyncio.to_thread(self.process.join, _END_S)
        return cause_of_death(self.process.exitcode or 0, "")

    async def end(self) -> None:
        """End an idle process, and make a busy one."""
        self.send(None)
        await asyncio.to_thread(self.process.join, _END_S)
        self.kill()

    def kill(self) -> None:
        self.process.kill()  # it ignores all other signals
        self.process.join(_END_S)
        for threads in (self._reader, self._writer):
            threads.shutdown(wait=False)


class Device:
    """One process that owns the device, and at most ``queue`` jobs that wait for it.

    Args:
        model: bundle, runtime and device as for ``Inpainter``.
        deadline_s: how long a job may take, waiting included.
        grace_s: how long a process may go on with a job that nobody waits for, before it is killed: it looks between
            two calls of the network.
        on_note: called with a line for the log.
    """

    def __init__(
        self,
        model: Model,
        queue: int,
        deadline_s: float,
        on_note: Callable[[str], None],
        grace_s: float = 60.0,
    ) -> None:
        self.model, self.queue, self.deadline_s, self.grace_s, self._note = model, queue, deadline_s, grace_s, on_note
        self.facts: dict[str, Any] = {}  # on the model, as ``worker`` tells them
        self.problem: MoebiusError | None = None  # why there is no process
        self.stopping = False
        self.starts, self.busy_s = 0, 0.0
        self._process: _Process | None = None
        self._processes: set[_Process] = set()  # this one, and one that takes its place or has given it up
        self._waiting: deque[Job] = deque()
        self._active: dict[int, Job] = {}
        self._numbers = 0
        self._mean_s = 1.0  # of a job on the device, as an exponential average
        self._held = False  # nothing is sent to a process that is being replaced
        self._changing = asyncio.Lock()  # held while a process is started
        self._tasks: set[asyncio.Task[None]] = set()

    # --- the process -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the bundle. Raises MoebiusError where that fails."""
        async with self._changing:
            if self._process is None and not self.stopping:
                self._adopt(await self._load())

    async def reload(self) -> None:
        """Load the bundle anew in a second process, which takes over between two pictures; if it fails the old stays.

        For as long as that takes there are two of them in memory.
        """
        async with self._changing:
            try:
                new = await self._load()
            except MoebiusError as error:
                if self._process is None:
                    self._give_up(error)
                else:
                    self._note(f"the bundle is not taken, the old one serves on: {error}")
                return
            self._held = True
            while self._active:
                await asyncio.sleep(0.05)
            old, self._process = self._process, None
            self._adopt(new)
            self._note("the bundle was loaded anew")
        if old is not None:
            await old.end()
            self._drop(old)

    async def _load(self) -> _Process:
        process = _Process(self.model)
        self._processes.add(process)
        self.starts += 1
        reply = await process.receive()
        if reply is not None and reply[1] == "ready":
            process.facts = reply[2]["model"]
            for text in reply[2]["notes"]:
                self._note(text)
            return process
        cause = "" if reply is not None else await process.cause_of_death()
        self._drop(process)
        if reply is not None:
            raise reply[2]["error"]
        raise ProcessFailed(f"the process that loads bundle {self.model[0]} {cause}", "see the lines above")

    def _adopt(self, process: _Process) -> None:
        self._process, self._held, self.problem, self.facts = process, False, None, process.facts
        self._spawn(self._listen(process))
        self._feed()

    async def _listen(self, process: _Process) -> None:
        """Hand the process's events to their jobs; when it has died, start another."""
        while (event := await process.receive()) is not None:
            number, name, values = event
            if (job := self._active.get(number)) is None:
                continue
            if name in ("result", "error", "stopped"):
                del self._active[number]
                self._count(values)
                self._feed()
            job.put(name, values)
        if process is not self._process:
            return
        self._process = None
        self._bury(f"the process that fills pictures {await process.cause_of_death()}")
        self._drop(process)
        await self._start_again()

    def _drop(self, process: _Process) -> None:
        self._processes.discard(process)
        process.kill()

    def _bury(self, cause: str) -> None:
        """Fail the job that the process died of, and let those that it had not begun wait again.

        Where it had begun none, reading one of them killed it, and all of them are failed.
        """
        self._note(cause)
        jobs = list(self._active.values())
        self._active.clear()
        victims = [job for job in jobs if job.started] or jobs
        for job in victims:
            job.fail(503, cause, "send the picture again")
        self._waiting.extendleft(job for job in reversed(jobs) if job not in victims and not job.stopped)

    async def _start_again(self) -> None:
        try:
            await self.start()
        except MoebiusError as error:
            self._give_up(error)

    def _give_up(self, error: MoebiusError) -> None:
        """Without a process all jobs fail; the next one has it tried again."""
        self.problem = error
        self._note(f"no picture can be filled: {error}")
        while self._waiting:
            self._waiting.popleft().fail(503, error.problem, error.remedy)

    def _count(self, values: dict[str, Any]) -> None:
        if total_ms := values.get("timing", {}).get("total_ms"):
            self.busy_s += total_ms / 1e3
            self._mean_s += 0.2 * (total_ms / 1e3 - self._mean_s)

    # --- the jobs --------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def active(self) -> int:
        return len(self._active)

    @property
    def status(self) -> str:
        """``ok`` where pictures are filled, else why not: ``stopping``, ``failed`` or ``starting``."""
        if self.stopping:
            return "stopping"
        return "failed" if self.problem else "starting" if self._process is None else "ok"

    @property
    def full(self) -> bool:
        return len(self._waiting) >= self.queue

    def busy(self) -> Refused:
        """The answer of a service whose queue is full: come back when it may have a place."""
        seconds = max(1, round(self._mean_s))
        problem = f"the service is busy: {len(self._active)} pictures are worked on and {len(self._waiting)} wait"
        return Refused(429, problem, f"try again in {seconds} seconds", seconds)

    def submit(self, order: worker.Order) -> Job:
        """Queue an order; ``leave`` must be called when nobody waits for it any more, also after its end.

        Raises Refused: the queue is full, or the service is about to end.
        """
        if self.stopping:
            raise Refused(503, "the service is shutting down", "try again in a minute", 60)
        if self.full:
            raise self.busy()
        self._numbers += 1
        job = Job(replace(order, number=self._numbers), self.deadline_s)
        self._waiting.append(job)
        if self._process is None and not self._changing.locked():
            self._spawn(self._start_again())
        self._feed()
        return job

    def leave(self, job: Job) -> None:
        """Nobody waits for ``job``: it is forgotten, or stopped before the next call of the network."""
        with suppress(ValueError):
            self._waiting.remove(job)
        if self._active.get(job.order.number) is job and self._process is not None and not job.stopped:
            job.stopped = True
            self._process.send(job.order.number)
            asyncio.get_running_loop().call_later(self.grace_s, self._kill_if_active, job, self._process)

    def _kill_if_active(self, job: Job, process: _Process) -> None:
        if self._active.get(job.order.number) is job and process is self._process:
            self._note(
                f"a picture that nobody waits for was not given up within {self.grace_s:g} s: its process is killed"
            )
            process.process.kill()

    def _feed(self) -> None:
        while self._waiting and self._process is not None and not self._held and len(self._active) < worker.AT_ONCE:
            job = self._waiting.popleft()
            self._active[job.order.number] = job
            self._process.send(job.order)

    def drain(self) -> None:
        """Finish what is worked on, and refuse the rest."""
        self.stopping = True
        while self._waiting:
            self._waiting.popleft().fail(503, "the service is shutting down", "try again in a minute")

    async def close(self) -> None:
        """End the process, at once if it is busy."""
        self.stopping = True
        process, self._process = self._process, None
        for task in [*self._tasks]:
            task.cancel()
        if process is not None and not self._active:
            await process.end()
        for process in [*self._processes]:
            self._drop(process)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)
