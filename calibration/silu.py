"""SiLU on what was dequantised, as the one node that ONNX Runtime has for it: for the target ``cpu`` alone.

x · sigmoid(x) reads its input twice. ONNX Runtime gives every reader of a dequantised tensor a pair of its own, and
then no longer sees that the two are one SiLU: it dequantises twice and multiplies in a pass of its own. Written as
``QuickGelu`` with alpha 1 (x · sigmoid(alpha x), in ONNX Runtime's domain), it stays one.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto, helper

_DOMAIN = "com.microsoft"


def fuse_silu(model: ModelProto) -> int:
    """Rewrites, in place, each SiLU on a dequantised tensor; returns how many there were."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    fused: dict[str, NodeProto] = {}  # the output of the product -> what makes it now
    gone: set[str] = set()
    for node in model.graph.node:
        if node.op_type != "Sigmoid" or node.input[0] not in made_by:
            continue
        behind = readers.get(node.output[0], [])
        if made_by[node.input[0]].op_type != "DequantizeLinear" or [n.op_type for n in behind] != ["Mul"]:
            continue
        product = behind[0]
        if sorted(product.input) == sorted((node.input[0], node.output[0])):
            silu = helper.make_node(
                "QuickGelu", [node.input[0]], list(product.output), product.name, domain=_DOMAIN, alpha=1.0
            )
            silu.metadata_props.extend(product.metadata_props)
            fused[product.output[0]] = silu
            gone.add(node.output[0])
    if fused:
        kept = [fused.get(n.output[0], n) for n in model.graph.node if n.output[0] not in gone]
        del model.graph.node[:]
        model.graph.node.extend(kept)
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    return len(fused)
