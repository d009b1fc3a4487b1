"""Records statistics of the denoiser's activations while the product's own pipeline fills pictures.

Every call is recorded as ``run`` would execute it; only the denoiser's graph is replaced by one that returns its
activations as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, helper

from ..bundle.bundle import Bundle
from ..data.calibration_pictures import picture_and_hole
from ..data.pictures import Pictures
from ..errors import BundleError, MachineError
from ..export.onnx_graph import PRODUCTS, constant_tensors, summed_axis
from ..export.precision import read_model
from ..pipeline.inpainter import Inpainter, Step
from ..progress import Progress
from ..runtimes.base import Arrays, Runtime
from ..runtimes.providers import first_line, quiet_options
from ..sampling.guidance import choose_guidance
from ..spec import DENOISER, Component
from ..system.fingerprint import ResultCache
from ..system.machine import available_cores
from .blocks import inlined
from .evaluate import AUTOENCODER, CombinedRuntime, ort_runtime
from .statistics import Statistics, TensorStatistics

_RESULT = "statistics"


def record(bundle: Bundle, pictures: Pictures, cache: ResultCache, progress: Progress, **settings: Any) -> Statistics:
    """Statistics of the activations of ``bundle``'s denoiser over ``pictures``, kept in ``cache`` after each picture.

    A recording that was interrupted goes on with the first picture that is not in it, and ends with the same numbers;
    a complete one is returned at once. ``settings`` are ``Inpainter.inpaint``'s ``steps``, ``guidance`` and ``seed``;
    without guidance it is the export gate's, which needs both branches.

    Raises:
        UsageError: a picture cannot be read, or a setting is out of range.
        MachineError: ONNX Runtime or memory is missing, or the cache cannot be written.
        BundleError: an activation is not finite (the message names it), or a file is damaged.
    """
    settings["guidance"] = choose_guidance(settings["guidance"], bundle.distilled_guidance).scale
    settings["start"] = bundle.defaults["start"]
    facts: dict[str, Any] = {
        "model": {component.file: bundle.files[component.file]["sha256"] for component in bundle.components.values()},
        "pictures": f"{len(pictures)}:{pictures.fingerprint()}",
        "onnx": onnx.__version__,  # which names inlined tensors
        **settings,
    }
    model = inlined(read_model(bundle.component_path(DENOISER)))
    empty = {name: TensorStatistics(axis).to_dict() for name, axis in activation_axes(model).items()}
    cached = cache.get(_RESULT, facts) or {"pictures": 0, "tensors": empty}
    tensors = {name: TensorStatistics.from_dict(content) for name, content in cached["tensors"].items()}
    statistics, number = Statistics(facts, tensors), len(pictures)
    if cached["pictures"] == number:
        return statistics
    recording = RecordingRuntime(bundle.components[DENOISER], model, tensors)
    with Inpainter(bundle, CombinedRuntime(recording, ort_runtime(bundle, *AUTOENCODER), {})) as inpainter:
        for i in range(cached["pictures"], number):

            def report(step: Step, i: int = i) -> None:
                what = f"record {pictures.name(i)}, {i + 1} of {number}"
                progress(what, i * step.total + step.index, number * step.total)

            picture, hole = picture_and_hole(pictures, i, bundle.resolution, settings["seed"])
            inpainter.inpaint(picture, hole, on_step=report, **{**settings, "seed": settings["seed"] + i})
            contents = {name: tensor.to_dict() for name, tensor in tensors.items()}
            cache.put(_RESULT, facts, {"pictures": i + 1, "tensors": contents})
    return statistics


def activation_axes(model: ModelProto) -> dict[str, int | None]:
    """The activations that INT8 may round in a model without function calls.

    They are the inputs of convolutions and matrix products. Each has the axis of its channels, if constant weights
    alone sum over them, or None.
    """
    constant = constant_tensors(model.graph)
    axes: dict[str, set[int | None]] = {}
    for node in model.graph.node:
        if node.op_type not in PRODUCTS:
            continue
        first, second = node.input[:2]
        for name, axis in ((first, summed_axis(node) if second in constant else None), (second, None)):
            if name not in constant:
                axes.setdefault(name, set()).add(axis)
    return {name: found.pop() if len(found) == 1 else None for name, found in axes.items()}


class RecordingRuntime(Runtime):
    """The denoiser ``model`` of a bundle in ONNX Runtime on the CPU; its activations are added to ``tensors``.

    A call returns all activations at once: at the published size they have 3.1 GiB. They go into the same memory every
    time, for new memory of that size takes longer to get than the statistics take.
    """

    def __init__(self, component: Component, model: ModelProto, tensors: dict[str, TensorStatistics]) -> None:
        super().__init__({DENOISER: component})
        self._tensors = tensors
        self._session: Any = None
        self._values: Arrays = {}  # of the last call
        present = {value.name for value in (*model.graph.input, *model.graph.output)}
        added = [name for name in self._tensors if name not in present]
        model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in added)
        self._model = model.SerializeToString()

    @property
    def info(self) -> dict[str, Any]:
        return {"name": "onnxruntime"}

    def activate(self) -> None:
        options = quiet_options(onnxruntime, available_cores())
        options.enable_cpu_mem_arena = False  # it would keep room for the outputs, which are copied
        with _explained():
            self._session = onnxruntime.InferenceSession(self._model, options, providers=["CPUExecutionProvider"])

    def deactivate(self) -> None:
        self._session, self._values = None, {}

    def _run(self, component: str, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        with _explained():
            self._compute(feeds)
        values = feeds | self._values

        def update(name: str) -> None:
            if not np.isfinite(values[name]).all():
                problem = f"activation {name} of the denoiser is not finite, its weights are damaged"
                raise BundleError(problem, "download or export the bundle again")
            self._tensors[name].update(values[name])

        with ThreadPoolExecutor(available_cores()) as threads:
            for _ in threads.map(update, self._tensors):
                pass  # an error is raised here
        return {name: values[name].copy() for name in outputs}

    def _compute(self, feeds: Arrays) -> None:
        """Set ``_values`` to all outputs, in the memory of the last call's if there are as many rows."""
        names = [output.name for output in self._session.get_outputs()]
        if len(self._values.get("noise", ())) != len(feeds["sample"]):
            self._values = {}
            self._values = dict(zip(names, self._session.run(names, feeds), strict=True))
            return
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        for name, value in self._values.items():
            binding.bind_output(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
        self._session.run_with_iobinding(binding)


@contextmanager
def _explained() -> Iterator[None]:
    """Errors of ONNX Runtime, which have a class of their own for every cause, as one of ours."""
    try:
        yield
    except Exception as error:
        remedy = "close other programs if memory is short, or export the bundle again"
        raise MachineError(f"the denoiser cannot be recorded ({first_line(error)})", remedy) from error
