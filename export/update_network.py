"""``update`` (see ``runtimes.latent_loop``) as a TensorRT network, layer by layer: it has no weights and no ONNX file.

Were it an ONNX file, it would have to be in every bundle, for a device has no onnx package to write one. All layers
here exist in all supported versions of both flavours.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..runtimes.latent_loop import COEFFICIENTS
from ..spec import LATENT_CHANNELS, Component

_SAMPLE_CHANNELS = 2 * LATENT_CHANNELS + 1
# Indices of channels. TensorRT reads them where they lie until the plan is built: never a temporary array.
_CHANNELS = np.arange(_SAMPLE_CHANNELS, dtype=np.int32)
_ALL_BUT_ROWS = 0b1110  # axes to sum over, a bit each


def define_update(trt: Any, network: Any, component: Component) -> None:
    """Add the layers of ``component`` (``update_component``) to an empty, strongly typed ``network``.

    ``trt`` is the TensorRT package. Slices are gathers, which need no sizes: the number of rows is free.
    """
    types = {"float32": trt.DataType.FLOAT, "int32": trt.DataType.INT32}
    given = {
        t.name: network.add_input(t.name, types[t.dtype], tuple(-1 if d == "N" else int(d) for d in t.shape))
        for t in component.inputs
    }

    def gather(tensor: Any, indices: Any, axis: int) -> Any:
        return network.add_gather(tensor, indices, axis).get_output(0)

    def channels(tensor: Any, start: int, stop: int) -> Any:
        indices = network.add_constant((stop - start,), _CHANNELS[start:stop]).get_output(0)
        return gather(tensor, indices, 1)

    def combine(operation: Any, a: Any, b: Any) -> Any:
        return network.add_elementwise(a, b, operation).get_output(0)

    def add(a: Any, b: Any) -> Any:
        return combine(trt.ElementWiseOperation.SUM, a, b)

    def times(name: str, a: Any) -> Any:
        index = COEFFICIENTS.index(name)
        return combine(trt.ElementWiseOperation.PROD, channels(given["coefficients"], index, index + 1), a)

    unconditional, conditional = (gather(given["noise"], given[n], 0) for n in ("unconditional", "conditional"))
    difference = combine(trt.ElementWiseOperation.SUB, conditional, unconditional)
    noise = add(unconditional, times("guidance", difference))
    latent = channels(given["sample"], 0, LATENT_CHANNELS)
    mask_and_masked = channels(given["sample"], LATENT_CHANNELS, _SAMPLE_CHANNELS)
    moved = add(add(times("latent", latent), times("noise", noise)), times("previous", given["clean"]))
    joined = network.add_concatenation([moved, mask_and_masked])
    joined.axis = 1
    size = network.add_unary(given["noise"], trt.UnaryOperation.ABS).get_output(0)
    made = {
        "next_sample": joined.get_output(0),
        "next_clean": add(times("clean_latent", latent), times("clean_noise", noise)),
        "magnitude": network.add_reduce(size, trt.ReduceOperation.SUM, _ALL_BUT_ROWS, True).get_output(0),
    }
    for tensor in component.outputs:
        made[tensor.name].name = tensor.name
        network.mark_output(made[tensor.name])
