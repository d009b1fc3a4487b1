"""Muon for the matrices, AdamW for the rest, behind one ``step``.

Muon (Jordan et al., 2024; ``torch.optim.Muon``) takes matrices only, and a 1x1 convolution is one: it is shown the
optimiser as a view of (outputs, inputs * kernel) on the same memory. Its steps are scaled so that one learning rate
serves both (Liu et al., arXiv 2502.16982, section 2.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# The ends of a network are left to AdamW, as Muon's authors advise.
_ENDS = ("conv_in.", "conv_out.", "embedding_layer.")


def is_matrix(name: str, parameter: nn.Parameter, muon: str = "dense") -> bool:
    """Whether Muon trains this parameter: a linear or dense convolution's weight inside the network.

    With ``muon`` ``all`` depthwise kernels and tables are matrices too, (first axis, all others): whatever has two
    axes or more, as upstream has it, 288 tensors of the published network.
    """
    if any(end in name for end in _ENDS) or parameter.ndim < 2:
        return False
    if muon == "all":
        return True
    if name.rpartition(".")[2] != "weight" or parameter.ndim not in (2, 4):
        return False
    outputs, inputs = len(parameter), parameter.numel() // len(parameter)
    return min(outputs, inputs) > 1 and not (parameter.ndim == 4 and parameter.shape[1] == 1)


class MuonAdamW:
    """An optimiser of a module's parameters, of which ``is_matrix`` chooses Muon's.

    It decays these; biases, norms and the rest are left alone, unless ``decay`` is ``all``. ``betas`` are AdamW's.
    """

    def __init__(
        self,
        module: nn.Module,
        learning_rate: float,
        weight_decay: float = 1e-2,
        decay: str = "matrices",
        muon: str = "dense",
        betas: tuple[float, float] = (0.9, 0.98),
    ) -> None:
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        matrices = [p for name, p in trained if is_matrix(name, p, muon)]
        self._pairs = [(p, nn.Parameter(p.detach().view(len(p), -1))) for p in matrices]
        self._muon = torch.optim.Muon(
            [view for _, view in self._pairs],
            lr=learning_rate,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        rest = [p for name, p in trained if not is_matrix(name, p, muon)]
        rest_decay = weight_decay if decay == "all" else 0.0
        self._adamw = torch.optim.AdamW(rest, lr=learning_rate, weight_decay=rest_decay, betas=betas)

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
        self._muon.load_state_dict(state["muon"])
        self._adamw.load_state_dict(state["adamw"])
