"""Multiply-adds of each kind of product, counted by hand."""

from __future__ import annotations

import pytest
from onnx import helper

from moebius_edge.export.onnx_graph import PRODUCTS, multiplications, summed_axis

SHAPES = {
    "image": (2, 6, 8, 8), "dense": (10, 6, 3, 3), "grouped": (6, 1, 3, 3), "up": (6, 10, 2, 2),
    "conv": (2, 10, 8, 8), "depthwise": (2, 6, 8, 8), "upsampled": (2, 10, 16, 16),
    "rows": (4, 5, 7), "matrix": (7, 3), "product": (4, 5, 3), "turned": (7, 5), "gemm": (5, 3), "free": (0, 7),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "left", "right", "out", "attributes", "count"),
    [
        ("Conv", "image", "dense", "conv", {}, 2 * 10 * 8 * 8 * 6 * 9),
        ("Conv", "image", "grouped", "depthwise", {"group": 6}, 2 * 6 * 8 * 8 * 9),
        ("ConvTranspose", "image", "up", "upsampled", {}, 2 * 6 * 8 * 8 * 10 * 4),
        ("MatMul", "rows", "matrix", "product", {}, 4 * 5 * 3 * 7),
        ("Gemm", "turned", "matrix", "gemm", {"transA": 1}, 5 * 3 * 7),
        ("MatMul", "free", "matrix", "product", {}, None),
        ("MatMul", "absent", "matrix", "product", {}, None),
    ],
)
def test_counts(kind: str, left: str, right: str, out: str, attributes: dict[str, int], count: int | None) -> None:
    assert multiplications(helper.make_node(kind, [left, right], [out], **attributes), SHAPES) == count


def test_the_axis_that_is_summed_over() -> None:
    axes = {kind: summed_axis(helper.make_node(kind, ["a", "b"], ["y"])) for kind in PRODUCTS}
    assert axes == {"Conv": 1, "ConvTranspose": 1, "MatMul": -1, "Gemm": -1}
    assert summed_axis(helper.make_node("Gemm", ["a", "b"], ["y"], transA=1)) == 0
