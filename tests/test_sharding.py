"""Shards on three processes, of weights whose rows do not divide among them: the steps and states of one process."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moebius_edge.training.optimiser import MuonAdamW
from moebius_edge.training.sharding import load_whole, local, shard, share_of, whole, whole_state

PROCESSES = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(6, 4, 1)  # two processes have two rows of it, the third none
        self.tall = nn.Conv2d(4, 7, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(7)
        self.last = nn.Linear(7, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.norm(self.tall(self.wide(x))).mean((2, 3)).tanh())
        return y


def train(net: nn.Module, optimiser: MuonAdamW, first: int, steps: int) -> None:
    """Every process has the same samples, so that their mean gradient is that of one."""
    for step in range(first, first + steps):
        x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(step), dtype=torch.double)
        optimiser.zero_grad()
        (net(x) - x.mean((2, 3))[:, :2]).square().mean().backward()
        optimiser.step()


def work(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    plain = Net().double()
    sharded, later = copy.deepcopy(plain), Net().double()
    for net in (sharded, later):
        shard(net, torch.device("cpu"))
    ours, theirs = MuonAdamW(sharded, 0.02), MuonAdamW(plain, 0.02)
    train(plain, theirs, 0, 3)
    train(sharded, ours, 0, 3)
    rows = local(sharded.wide.weight).shape[0]
    assert isinstance(sharded.wide.weight, DTensor) and rows == (2, 2, 0)[rank]
    torch.testing.assert_close(share_of(plain.wide.weight.detach(), sharded.wide.weight), sharded.wide.weight.detach())

    kept = whole_state({"network": sharded.state_dict(), "optimiser": ours.state_dict()})
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(kept["network"][name], tensor, rtol=0, atol=1e-12)
    for kind, expected in theirs.state_dict().items():
        assert kept["optimiser"][kind]["param_groups"] == expected["param_groups"]
        torch.testing.assert_close(kept["optimiser"][kind]["state"], expected["state"], rtol=0, atol=1e-12)
    assert whole_state(sharded.state_dict(), keep=False)["last.weight"] is None

    kept = copy.deepcopy(kept)  # as a file would be
    load_whole(later, kept["network"])
    resumed = MuonAdamW(later, 0.02)
    resumed.load_state_dict(kept["optimiser"])
    train(sharded, ours, 3, 2)
    train(later, resumed, 3, 2)
    assert all(torch.equal(local(a), local(b)) for a, b in zip(later.parameters(), sharded.parameters(), strict=True))
    alone = Net().double()
    load_whole(alone, whole_state(sharded.state_dict()))
    assert all(torch.equal(a, whole(b)) for a, b in zip(alone.parameters(), sharded.parameters(), strict=True))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_steps_and_states_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(work, (os.fspath(tmp_path / "store"),), PROCESSES)
