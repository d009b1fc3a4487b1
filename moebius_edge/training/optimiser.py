"""Muon for the matrices, AdamW for the rest, behind one ``step``.

Muon (Jordan et al., 2024; ``torch.optim.Muon``) takes matrices only, and a 1x1 convolution is one: it is shown the
optimiser as a view of (outputs, inputs * kernel) on the same memory. Its steps are scaled so that one learning rate
serves both (Liu et al., arXiv 2502.16982, section 2.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .sharding import share_of, whole

# The ends of a network are left to AdamW, as Muon's authors advise; tables and depthwise kernels are no matrices.
_ENDS = ("conv_in.", "conv_out.", "embedding_layer.")


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon trains this parameter: a linear or dense convolution's weight inside the network."""
    if name.rpartition(".")[2] != "weight" or parameter.ndim not in (2, 4) or any(end in name for end in _ENDS):
        return False
    outputs, inputs = len(parameter), parameter.numel() // len(parameter)
    return min(outputs, inputs) > 1 and not (parameter.ndim == 4 and parameter.shape[1] == 1)


class ShardedMuon(torch.optim.Muon):
    """``torch.optim.Muon`` for matrices sharded by rows, with the same state.

    The momentum stays sharded. Each matrix is gathered once, in the bfloat16 that Muon orthogonalises in, and every
    process does that with the whole of it. ``torch.optim.Muon`` itself takes sharded matrices as well, but talks at
    every product: 16 times for a matrix.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Once; a closure is not called."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        update = whole(update.bfloat16()).to(parameter.dtype)
        # Muon's step of a zero, by this update and nothing else, is the orthogonal factor with its scale.
        step = nn.Parameter(torch.zeros_like(update))
        step.grad = update
        plain: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
        chosen = {name: group[name] for name in ("ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
        torch.optim.Muon([step], **plain, **chosen).step()
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(share_of(step.detach(), parameter), alpha=group["lr"])


class MuonAdamW:
    """An optimiser of a module's parameters, sharded or not.

    Decays matrices; biases, norms and tables are left alone.
    """

    def __init__(self, module: nn.Module, learning_rate: float, weight_decay: float = 1e-2) -> None:
        matrices = [p for n, p in module.named_parameters() if p.requires_grad and is_matrix(n, p)]
        rest = [p for n, p in module.named_parameters() if p.requires_grad and not is_matrix(n, p)]
        self._pairs = [(p, nn.Parameter(p.detach().view(len(p), -1))) for p in matrices]
        sharded = any(isinstance(p, DTensor) for p in matrices)
        self._muon = (ShardedMuon if sharded else torch.optim.Muon)(
            [view for _, view in self._pairs],
            lr=learning_rate,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self._adamw = torch.optim.AdamW(rest, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameters themselves, as ``torch.amp.GradScaler`` wants them: Muon's groups hold views."""
        return [{"params": [parameter for parameter, _ in self._pairs]}, *self._adamw.param_groups]

    def set_learning_rate(self, value: float) -> None:
        for group in (*self._muon.param_groups, *self._adamw.param_groups):
            group["lr"] = value

    def step(self) -> None:
        for parameter, view in self._pairs:
            view.grad = None if parameter.grad is None else parameter.grad.reshape(view.shape)
        self._muon.step()
        self._adamw.step()

    def zero_grad(self) -> None:
        for parameter, view in self._pairs:
            parameter.grad = view.grad = None
        self._adamw.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """``state`` as ``state_dict`` gives it, but whole (``sharding.whole_state``)."""
        for optimiser, theirs in ((self._muon, state["muon"]), (self._adamw, state["adamw"])):
            parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
            shares = {
                number: {name: share_of(value, parameters[number]) for name, value in values.items()}
                for number, values in theirs["state"].items()
            }
            optimiser.load_state_dict({**theirs, "state": shares})
