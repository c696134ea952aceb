"""What stacking the A of linears that read the same input would save: too little to be built (LIMITS.md)."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_fx.kinds import wide
from lora_fx.kinds.stacked import scaled
from tests.benchmarks.measure import Interval, estimate
from tests.benchmarks.table import Figure, Findings

SECONDS, RANK, WORTH_IT = 6.0, 16, 0.03
BERT, LLAMA = 12 * 768**2, 1024 * (2 * 1024 + 2 * 256 + 3 * 2816)
SHAPES = {  # rows, columns, what each has out, and the elements of all the layer's weights
    "q, k, v of BERT-base-like": (512, 768, (768, 768, 768), BERT),
    "q, k, v of Llama-like": (256, 1024, (1024, 256, 256), LLAMA),
    "gate, up of Llama-like": (256, 1024, (2816, 2816), LLAMA),
}


@dataclass
class Group:
    """Siblings in one step: x, every A, and the gradients that come back to h and to x."""

    x: Tensor
    stack: list[Tensor]
    back: list[Tensor]
    dxs: list[Tensor]

    def apart(self) -> None:
        """h = x A^T, dA = dh^T x and dx += dh A of each."""
        for a in self.stack:
            _thin(self.x, a)
        for a, dh, dx in zip(self.stack, self.back, self.dxs, strict=True):
            _thin_back(self.x, a, dh, dx)

    def stacked(self) -> None:
        """The same of all at once; A is stacked in the forward and, not being kept, in the backward."""
        _thin(self.x, torch.cat(self.stack))
        _thin_back(self.x, torch.cat(self.stack), torch.cat(self.back, 1), self.dxs[0])


def _thin(x: Tensor, a: Tensor) -> Tensor:
    return F.linear(x, a) if x.dtype is a.dtype else wide.thin(x, a)


def _thin_back(x: Tensor, a: Tensor, dh: Tensor, dx: Tensor) -> None:
    if x.dtype is a.dtype:
        scaled(dh.t(), x, 1.0, a)
        dx.addmm_(dh, a)
    else:
        wide.outer(dh, x, 1.0, a)
        wide.add_thin(dx, dh, a, 1.0)


@pytest.mark.bench
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_stacking_siblings_would_save_too_little(shape: str, dtype: torch.dtype, findings: Findings) -> None:
    torch.manual_seed(0)
    rows, columns, outs, layer = SHAPES[shape]
    stack, back = ([torch.randn(n, m) for _ in outs] for n, m in ((RANK, columns), (rows, RANK)))
    dxs = [torch.zeros(rows, columns, dtype=dtype) for _ in outs]
    group = Group(torch.randn(rows, columns).to(dtype), stack, back, dxs)
    bases = [(torch.randn(out, columns, dtype=dtype), torch.randn(rows, out, dtype=dtype)) for out in outs]

    def base() -> None:
        for weight, g in bases:
            F.linear(group.x, weight)
            torch.mm(g, weight)

    ways = {"base": base, "apart": group.apart, "again": group.apart, "stacked": group.stacked}
    taken = {name: list[float]() for name in ways}
    draw, end = random.Random(0), time.process_time() + SECONDS
    while time.process_time() < end:
        for name in draw.sample(list(ways), len(ways)):
            started = time.process_time()
            ways[name]()
            taken[name].append(time.process_time() - started)

    def saved(other: str) -> Interval:
        rounds = zip(*(taken[n] for n in ("apart", other, "base")), strict=True)
        share = columns * sum(outs) / layer
        shares = [share * (apart - there) / base for apart, there, base in rounds]
        return estimate(lambda chosen: statistics.median(shares[i] for i in chosen), len(shares))

    print(f"\n{shape}, {dtype}: {saved('stacked')} of the layer's linears, control {saved('again')}")
    what = f"stacked A, {shape}, {dtype}: saved of the layer's linears, one more node not counted"
    findings.check(Figure(what, saved("stacked").low, WORTH_IT))
