"""How much memory folding a checkpoint on disk takes: the largest tensor's, however many there are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lora_fx
from tests.benchmarks.test_onnx_cost import MEGABYTE, trained

LAYERS, WIDTH = 6, 4096

FOLD = """
import sys
import torch
import lora_fx

def resident(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(key))

base, adapter, out, check = sys.argv[1:]
torch.addmm(torch.zeros(8, 8), torch.zeros(8, 2), torch.zeros(2, 8))
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
before = resident("VmRSS")
lora_fx.fold_checkpoint(base, adapter, out, base_check=check, min_retained=0)
print(resident("VmHWM") - before)
"""


@pytest.mark.bench
@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's own account of memory")
@pytest.mark.parametrize("case", ["float32", "bfloat16", "experts", "dora", "columns"])
def test_memory_while_streaming(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    model: nn.Module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    x = torch.randn(2, WIDTH)
    if case == "experts":
        model, x = Experts(), torch.randn(8, 2, WIDTH // 4)
    if case == "columns":
        model, x = Embeddings(), torch.arange(4)
    base, adapter, out = (
        tmp_path / name for name in ("base.safetensors", "a.safetensors", "out.safetensors")
    )
    save_file({name: tensor.to(dtype) for name, tensor in model.state_dict().items()}, base)
    lora_fx.save_adapter(
        trained(model, lora_fx.Policy(lora_fx.Rule(rank=8, dora=case == "dora")), x), adapter
    )
    largest = WIDTH * WIDTH * dtype.itemsize
    limit = 1.3 * largest + 150 * MEGABYTE
    check = "exact" if dtype == torch.float32 else "shape"
    command = [sys.executable, "-c", FOLD, str(base), str(adapter), str(out), check]
    made = subprocess.run(command, check=True, capture_output=True, text=True)
    peak = int(made.stdout)
    print(f"\n{case}: {LAYERS} weights of {largest // MEGABYTE} MB: {peak // MEGABYTE} MB")
    assert largest // 2 < peak <= limit
    assert out.stat().st_size == base.stat().st_size >= LAYERS * largest


class Experts(nn.Module):
    """Stacks of sixteen square matrices, each stack as large as the other cases' weights."""

    def __init__(self) -> None:
        super().__init__()
        side = WIDTH // 4
        self.stacks = nn.ParameterList(torch.randn(16, side, side) / side**0.5 for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stack in self.stacks:
            x = torch.bmm(x.repeat(2, 1, 1), stack)[:8]
        return x


class Embeddings(nn.Module):
    """Tables, whose axis 0 is the columns of their matrix form."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([table(ids) for table in self.tables]).sum(0)
