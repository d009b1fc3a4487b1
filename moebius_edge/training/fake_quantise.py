"""INT8 simulated in a student that trains: the inputs and weights of chosen products rounded, gradients let through.

The placement is that of ``calibration.quantise`` for ``tensorrt``: q = clip(round(x / scale)) with zero point 0 at both
inputs of a convolution or linear layer, weights with one scale a channel of the output, taken anew at every step,
activations with one scale a tensor, fixed after ``Simulation.calibrate``. Rounding has a gradient of 1 inside the range
and 0 beyond it (the straight-through estimator: Bengio et al., arXiv 1308.3432; Jacob et al., arXiv 1712.05877, section
3). Export folds batch norms into these weights, which scales whole channels of the output and commutes with rounding
them; what scales or adds up inputs (a group norm, the taps of a doubled grid) is folded here before rounding too.

The products inside lambda operators are not simulated: export sums them in another order than the plain network does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BundleError, UsageError
from ..export.int8_ranges import LARGEST, Histogram, activation_scale
from ..export.specialise import phase_kernels, phases_together
from ..model import Student, StudentConfig, build_student
from ..model.config import GROUPS
from ..model.lambdas import InteractiveLambda, LocalLambda
from ..model.layers import Downsample, Resnet, SpatialTransformer, TimeEmbedding, Upsample
from ..model.student import MixFFN, SeparableConv

# The products of each kind of module -> what their block's name adds to the module's path, see ``calibration.blocks``.
_PRODUCTS: dict[type[nn.Module], dict[str, str]] = {
    TimeEmbedding: {"linear_1": "", "linear_2": ""},
    Resnet: {"time_emb_proj": ".time_emb_proj", "conv_shortcut": ".conv_shortcut"},
    SeparableConv: {"conv_dw": ".depthwise", "conv_pw": ""},
    SpatialTransformer: {"proj_in": ".proj_in", "proj_out": ".proj_out"},
    LocalLambda: {"to_q": "", "to_k": "", "to_v": ""},
    InteractiveLambda: {"to_q": ""},  # its keys and values are constants in an exported file
    MixFFN: {"inverted_conv.conv": "", "depth_conv.conv": ".depthwise", "point_conv.conv": ""},
    Downsample: {"conv": ".conv"},
    Upsample: {"conv": ".phases"},
}
_ALSO = ".lambda"  # the block of the products inside a lambda operator


def round_weight(weight: Tensor) -> Tensor:
    """``weight`` (C, ...) on the grid of symmetric INT8: the scale of an output channel is its largest magnitude
    over 127, and 1 where all is 0."""
    largest = weight.detach().flatten(1).abs().amax(1).float()
    scale = torch.where(largest == 0, 1.0, largest / LARGEST)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight.float(), scale, zero, 0, -LARGEST, LARGEST)


def round_activation(x: Tensor, scales: tuple[float, ...]) -> Tensor:
    """``x`` (N, C, ...) on the grid of INT8, -128 to 127; with several scales each has its share of the channels."""
    parts = x.float().chunk(len(scales), 1)
    low, high = -LARGEST - 1, LARGEST
    rounded = [torch.fake_quantize_per_tensor_affine(p, s, 0, low, high) for p, s in zip(parts, scales, strict=True)]
    return rounded[0] if len(rounded) == 1 else torch.cat(rounded, 1)


class Rounded(nn.Module):
    """A convolution or linear layer with its parameters under the same names, rounding its input and weight.

    ``parts``: into how many tensors export divides the input's channels. Until it has ``scales``, one a part, it
    computes in floating point; where it has ``histograms`` it adds the input's magnitudes to them.
    """

    def __init__(self, plain: nn.Conv2d | nn.Linear, path: str, parts: int = 1) -> None:
        super().__init__()
        self.path, self.parts = path, parts
        self.weight, self.bias = plain.weight, plain.bias
        self.scales: tuple[float, ...] = ()
        self.histograms: list[Histogram] = []
        self._product: Callable[..., Tensor] = F.linear if isinstance(plain, nn.Linear) else plain._conv_forward

    def forward(self, x: Tensor) -> Tensor:
        """x and result as the plain layer's."""
        for name, part, histogram in zip(self.tensors, x.chunk(self.parts, 1), self.histograms, strict=False):
            magnitudes = part.detach().abs().float().cpu().numpy()
            if not magnitudes.max() < float("inf"):
                raise BundleError(
                    f"activation {name} of the student is not finite: its weights are damaged, or fp16 overflows; "
                    "train in fp32, or start from another checkpoint"
                )
            histogram.add(magnitudes)
        if not self.scales:
            return self.product(x, lambda weight: weight)
        return self.product(round_activation(x, self.scales), round_weight)

    def product(self, x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer on ``x``, its weight as export has it rounded by ``rounding``."""
        return self._product(x, rounding(self.weight), self.bias)

    @property
    def tensors(self) -> list[str]:
        """What errors and records call the input's parts."""
        return [self.path] if self.parts == 1 else [f"{self.path}[{part}]" for part in range(self.parts)]


class Unscaled(nn.Module):
    """A group norm that leaves its gain and bias, kept under the same names, to the projection that follows."""

    def __init__(self, plain: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self._eps = plain.weight, plain.bias, plain.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, GROUPS, eps=self._eps)


class RoundedProjection(Rounded):
    """``proj_in``, with the gain and bias of the norm before it in its weight and bias."""

    def __init__(self, plain: nn.Conv2d, path: str, norm: Unscaled) -> None:
        super().__init__(plain, path)
        self._norm = (norm,)  # in a tuple it is no part of this module, whose parameters stay the plain layer's

    def product(self, x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        (norm,) = self._norm
        weight = self.weight.flatten(1)
        assert self.bias is not None
        bias = self.bias + weight @ norm.bias
        return self._product(x, rounding(weight * norm.weight)[..., None, None], bias)


class RoundedUpsample(Rounded):
    """The convolution of an upsampler: takes the doubled grid, and computes export's four on the small one."""

    def product(self, x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        kernels = [rounding(kernel) for kernel in phase_kernels(self.weight)]
        return phases_together(x[:, :, ::2, ::2], [partial(F.conv2d, weight=k, bias=self.bias) for k in kernels])


@dataclass(frozen=True)
class Simulation:
    """The rounded products of a student; ``left`` are blocks of the recipe that stay in floating point."""

    products: list[Rounded]
    left: list[str]

    @torch.no_grad()
    def calibrate(self, passes: Iterable[Callable[[], object]], method: str) -> None:
        """Fix the activations' scales by ``method`` of ``int8_ranges.METHODS`` over ``passes``, each a forward pass.

        Raises:
            UsageError: a range is zero. BundleError: an activation is not finite. Both name it.
        """
        for product in self.products:
            product.scales, product.histograms = (), [Histogram() for _ in range(product.parts)]
        for forward in passes:
            forward()
        for product in self.products:
            pairs = zip(product.tensors, product.histograms, strict=True)
            product.scales = tuple(activation_scale(name, histogram, method) for name, histogram in pairs)
            product.histograms = []

    @property
    def scales(self) -> dict[str, float]:
        """The step of every activation, by the path of the layer that reads it."""
        return {name: s for p in self.products for name, s in zip(p.tensors, p.scales, strict=True)}


def simulate(student: Student, blocks: Iterable[str]) -> Simulation:
    """Replace, in place, the products of ``blocks`` by rounded ones; parameters and their names stay as they are.

    Raises UsageError for a block that the student does not have, or if none of them can be simulated.
    """
    chosen = set(blocks)
    network = student.diff_model
    places = list(_products(network))
    if unknown := sorted(chosen - {*_block_names(network)}):
        problem = f"the recipe names blocks that the model does not have: {', '.join(unknown[:3])}"
        raise UsageError(problem, "remove them, or use the recipe with the model it was made for")
    products = []
    for path, block in places:
        if block not in chosen:
            continue
        above, _, name = path.rpartition(".")
        parent = network.get_submodule(above)
        plain = cast(nn.Conv2d, getattr(parent, name))
        if isinstance(parent, Upsample):
            product: Rounded = RoundedUpsample(plain, path)
        elif isinstance(parent, SpatialTransformer) and name == "proj_in":
            norm = Unscaled(parent.norm)
            parent.add_module("norm", norm)
            product = RoundedProjection(plain, path, norm)
        else:  # export has the Mix-FFN's value and gate apart
            product = Rounded(plain, path, parts=2 if path.endswith(".ff.depth_conv.conv") else 1)
        parent.add_module(name, product)
        products.append(product)
    left = sorted(chosen - {block for _, block in places})
    if not products:
        raise UsageError(
            f"the recipe quantises nothing that training simulates ({', '.join(left[:3]) or 'no block at all'}): "
            "name convolutions and linear layers"
        )
    return Simulation(products, left)


def block_names(config: StudentConfig) -> list[str]:
    """The names that ``calibration.blocks`` gives the blocks of the exported student of ``config``."""
    with torch.device("meta"):
        return _block_names(build_student(config).diff_model)


def _products(network: nn.Module) -> Iterator[tuple[str, str]]:
    """The path of every product that can be simulated, and the name of its block."""
    modules = dict(network.named_modules())
    for path, module in modules.items():
        for name, ending in _PRODUCTS.get(type(module), {}).items():
            if f"{path}.{name}" in modules:
                yield f"{path}.{name}", _block(path) + ending


def _block_names(network: nn.Module) -> list[str]:
    operators = [p for p, m in network.named_modules() if isinstance(m, (LocalLambda, InteractiveLambda))]
    return [*(block for _, block in _products(network)), *(_block(path) + _ALSO for path in operators)]


def _block(path: str) -> str:
    """A block's name from the path of its module in the plain network: an exported transformer block has no number."""
    return path.replace(".transformer_blocks.0", "")
