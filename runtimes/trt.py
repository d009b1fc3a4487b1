"""TensorRT, both variants: engines that ``export --engine`` built for this machine, on its GPU.

Loading and checking stand here; buffers, launches and sampling on the device are in ``latent_loop``, files and keys in
``engine_files``. An engine is never built here, for that takes minutes. Use a runtime on the thread that entered it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BundleError, MachineError, OutOfMemory, UsageError
from ..sampling.scheduler import Scheduler
from ..spec import DENOISER, SHALLOW, Component
from .base import Arrays, LatentBatch, Runtime, is_verbose
from .cuda import Cuda, CudaError, Gpu
from .engine_files import VARIANTS, Engine, RuntimeCache, build_command, choose_engine, load_package, make_logger
from .engine_memory import check_fits, plan_memory
from .lambda_plugin import load_plugin
from .latent_loop import UPDATE, DeviceLatents, Executor, LatentLoop, LaunchError, shared_tensors, update_component

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle

_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|failed to allocate", re.IGNORECASE)
_logged: list[str] = []  # errors that TensorRT logged since the last call


class TrtRuntime(Runtime):
    """One engine a component and one for the sampler's arithmetic, for ``variant`` ``tensorrt`` or ``tensorrt-rtx``.

    It takes a bundle, since an engine is chosen by what the bundle's files and this machine are. ``cuda`` and
    ``package`` stand in for the driver and the Python package.

    Raises:
        UsageError: a device other than the GPU was asked for.
        MachineError: the package or the driver is missing; ``OutOfMemory`` on entering.
        BundleError: the bundle has no engine that fits (on entering).
    """

    executes_onnx = False

    def __init__(
        self,
        bundle: Bundle,
        variant: str = "tensorrt",
        device: str = "cuda",
        *,
        cuda: Cuda | None = None,
        package: ModuleType | None = None,
    ) -> None:
        super().__init__(bundle.components)
        if device != "cuda":
            raise UsageError(f"runtime {variant} has no device {device!r}", "leave --device out, or choose cuda")
        self._bundle = bundle
        self._variant = VARIANTS[variant]
        self._trt: Any = package or load_package(self._variant)
        self._cuda = cuda or Cuda()
        # TensorRT for RTX compiles kernels while it runs, and records a CUDA graph itself when it has them.
        self._records = self._variant.needs_gpu
        self._gpu: Gpu | None = None
        self._engine: Engine | None = None
        self._stream = 0
        self._open = False
        self._runtime: Any = None  # TensorRT's objects: contexts need their engines, engines their runtime
        self._engines: dict[str, Any] = {}
        self._configs: dict[str, Any] = {}
        self._cache: RuntimeCache | None = None
        self._activations = (0, 0)  # address and size of the memory that all contexts compute in, one after another
        self._executors: dict[str, Executor] = {}
        self._loop: LatentLoop | None = None

    @property
    def info(self) -> dict[str, Any]:
        """As in ``Runtime``; ``provider`` is the engine's key, and empty until the runtime was entered."""
        graph = "not recorded" if self._loop is None else self._loop.graph_state
        return {
            "name": self._variant.name,
            "version": str(self._trt.__version__),
            "device": "cuda",
            "provider": "" if self._engine is None else self._engine.key.folder,
            "gpu": "" if self._gpu is None else self._gpu.name,
            "cuda_graph": graph if self._records else "TensorRT's own",
            **({} if self._cache is None else {"runtime_cache": self._cache.state}),
        }

    @property
    def pictures_per_call(self) -> int:
        """As many as the engine was built for with ``--max-batch``, which is 1 unless the user asked for more."""
        return self._executors[DENOISER].max_rows // self._bundle.branches if self._executors else 1

    def activate(self) -> None:
        self._cache = None
        try:
            self._gpu = self._cuda.gpu()
            self._engine = choose_engine(self._bundle, self._variant, str(self._trt.__version__), self._gpu)
            load_plugin(self._trt, self._engine)
            self._cuda.open()
            self._open = True
            check_fits(plan_memory(self._bundle, self._engine, self._gpu), self._bundle, self._variant, self._cuda)
            self._stream = self._cuda.create_stream()
            latents = self._bundle.latent_size, self._bundle.latent_channels
            components = (*self.components.values(), update_component(*latents))
            self._runtime = self._call(f"start {self._variant.title}", self._trt.Runtime, _logger(self._trt))
            for component in components:
                self._load_engine(component.name)
            self._allocate_activations()
            for component in components:
                self._create_executor(component)
            networks = [self._executors[name] for name in (DENOISER, SHALLOW) if name in self._executors]
            update = self._executors[UPDATE]
            self._loop = LatentLoop(
                self._cuda, self._stream, networks, update, self._records, self._errors, self._check_loop_rows
            )
            for pictures in sorted({1, self.pictures_per_call}):
                for rows in sorted({pictures, pictures * self._bundle.branches}):
                    self._loop.prepare(rows, pictures)
        except (CudaError, LaunchError) as error:
            raise self._problem("load the engines", error) from error

    def deactivate(self) -> None:
        if not self._open:
            return
        executors = list(self._executors.values())
        frees: list[Callable[[], None]] = [] if self._loop is None else [self._loop.close]
        frees += [executor.destroy_contexts for executor in executors]
        frees += [executor.free for executor in executors]
        if self._activations[0]:
            frees.append(partial(self._cuda.free, self._activations[0]))
        frees.append(self._release)
        if self._stream:
            frees.append(partial(self._cuda.destroy_stream, self._stream))
        frees.append(self._cuda.close)
        if self._cache is not None:
            self._cache.save()
        for free in frees:
            with suppress(CudaError):  # after a failed launch nothing can be freed, and that error is the one to tell
                free()
        self._loop, self._stream, self._open, self._activations = None, 0, False, (0, 0)

    def _release(self) -> None:
        """Let go of TensorRT's objects, each before what it was made from."""
        self._executors.clear()
        self._configs.clear()
        if self._cache is not None:
            self._cache.handle = None
        self._engines.clear()
        self._runtime = None

    def _load_engine(self, name: str) -> None:
        assert self._engine is not None
        path = self._engine.plan_path(name)
        with self._engine.map_plan(name, self._remedy("--force")) as plan:
            self._engines[name] = self._call(f"load {path}", self._runtime.deserialize_cuda_engine, plan)
        if self._records:
            return
        # It must live as long as the contexts that are made with it.
        config = self._configs[name] = self._engines[name].create_runtime_config()
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # Compile for the shapes at hand at once, and not in the background while slower kernels run.
        config.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._cache is None:
            assert self._gpu is not None
            self._cache = RuntimeCache(config, self._engine.path, self._gpu.name)
            self.notes += self._cache.notes
        config.set_runtime_cache(self._cache.handle)

    def _allocate_activations(self) -> None:
        size = max(int(engine.device_memory_size_v2) for engine in self._engines.values())
        if size:
            self._activations = (self._cuda.allocate(size), size)

    def _create_executor(self, component: Component) -> None:
        """Make the executor of ``component``, and take its buffers but for those it shares with the denoiser."""
        owners = {tensor: self._executors[DENOISER] for tensor in shared_tensors(component)}
        max_rows = min([self._check_contract(component), *(owner.max_rows for owner in owners.values())])
        create = partial(self._create_context, component.name)
        executor = Executor(self._cuda, self._stream, create, component, max_rows, owners)
        self._executors[component.name] = executor
        executor.allocate()
        executor.set_rows(1)

    def _create_context(self, name: str) -> Any:
        """A context that computes in the memory that all of them share."""
        strategy = self._configs.get(name, self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        context = self._call(f"prepare the engine of {name}", self._engines[name].create_execution_context, strategy)
        if self._activations[0]:
            context.set_device_memory(*self._activations)
        return context

    def _check_contract(self, component: Component) -> int:
        """The most rows the engine of ``component`` takes, if its tensors are those of the component."""
        tensors = self._tensors_of(component.name)
        expected: dict[str, tuple[Any, ...]] = {}
        for kind, declared in (("input", component.inputs), ("output", component.outputs)):
            expected |= {t.name: (kind, t.dtype, t.shape[1:]) for t in declared}
        if tensors != expected:
            problem = f"the engine of {component.name} has {tensors} and should have {expected}"
            raise BundleError(problem, self._remedy("--force"))
        profiles = (self._engines[component.name].get_tensor_profile_shape(t.name, 0) for t in component.inputs)
        return min(int(most[0]) for least, best, most in profiles)

    def _tensors_of(self, component: str) -> dict[str, tuple[str, str, tuple[int, ...]]]:
        """Whether it is read or written, type and shape but for the rows, of each tensor of an engine."""
        engine, tensors = self._engines[component], {}
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            kind = "input" if engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT else "output"
            dtype = np.dtype(self._trt.nptype(engine.get_tensor_dtype(name))).name
            tensors[name] = (kind, dtype, tuple(engine.get_tensor_shape(name))[1:])
        return tensors

    def _run(self, component: str, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        self._check_rows(component, len(next(iter(feeds.values()))))
        if component in (DENOISER, SHALLOW) and self._loop is not None:
            self._loop.current = None
        with self._errors(f"run {component}"):
            return self._executors[component].run(feeds, outputs)

    def start_sampling(self, latents: np.ndarray, condition: np.ndarray, scheduler: Scheduler) -> LatentBatch:
        self._check_active()
        assert self._loop is not None
        return DeviceLatents(self._loop, latents, condition, scheduler)

    def _check_loop_rows(self, rows: int) -> None:
        for name in (DENOISER, SHALLOW, UPDATE):
            if name in self._executors:
                self._check_rows(name, rows)

    def _check_rows(self, component: str, rows: int) -> None:
        most = self._executors[component].max_rows
        if rows > most:
            pictures = rows // self._bundle.branches if component in (DENOISER, SHALLOW, UPDATE) else rows
            problem = f"the engine of {component} takes {most} rows and this call has {rows}"
            raise BundleError(problem, self._remedy(f"--max-batch {pictures}"))

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """What the driver or TensorRT refuses, as an error of ours."""
        _logged.clear()
        try:
            yield
        except (CudaError, LaunchError) as error:
            raise self._problem(what, error) from error

    def _call(self, what: str, function: Any, *arguments: Any) -> Any:
        """What TensorRT's ``function`` makes; TensorRT says no by returning None."""
        _logged.clear()
        try:
            result = function(*arguments)
        except (RuntimeError, TypeError) as error:  # a constructor that fails
            raise self._problem(what, error) from error
        if result is None:
            raise self._problem(what, LaunchError("no reason given"))
        return result

    def _problem(self, what: str, error: Exception) -> BundleError | MachineError:
        reason = " ".join((_logged[0] if _logged else str(error)).split())
        message = f"{self._variant.title} {self._trt.__version__} cannot {what} ({reason})"
        if getattr(error, "out_of_memory", False) or any(map(_OUT_OF_MEMORY.search, _logged)):
            return OutOfMemory(f"{message}: not enough memory on the GPU", "close other programs")
        if isinstance(error, CudaError):
            return MachineError(message, "check the GPU with `nvidia-smi` and start again")
        return BundleError(message, self._remedy("--force"))

    def _remedy(self, options: str) -> str:
        return f"run `{build_command(self._bundle, self._variant)}` with {options}"


@cache
def _logger(package: Any) -> Any:
    """One a package: TensorRT keeps the first logger it is given as long as it lives."""

    def log(severity: str, text: str) -> None:
        if "ERROR" in severity:
            _logged.append(text)
        if is_verbose():
            print(f"tensorrt {severity.lower()}: {text}", file=sys.stderr)

    return make_logger(package, log)
