from __future__ import annotations

import torch
from torch import fx, nn

import lora_fx
from lora_fx.passes.show import show_forward

RULE = lora_fx.Policy(lora_fx.Rule(rank=2))


def test_before_and_after_of_a_linear() -> None:
    model = lora_fx.inject(nn.Sequential(nn.Linear(4, 4)), RULE, torch.randn(2, 4))
    before, _, after = show_forward(model[0]).partition("# after")
    assert "F.linear(input, self.weight, self.bias)" in before
    assert "adapted_linear" not in before
    assert "adapted_linear(input_1, weight__w0, bias, lora = weight__lora)" in after


def test_the_source_keeps_its_indentation() -> None:
    class Gated(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.dim() > 1:
                return super().forward(x)
            return x

    lines = show_forward(Gated(4, 4)).splitlines()
    assert lines[1].startswith("def forward(self")
    assert lines[2:] == ["    if x.dim() > 1:", "        return super().forward(x)", "    return x"]
    model = lora_fx.inject(nn.Sequential(Gated(4, 4)), RULE, torch.randn(2, 4))
    assert lines[2:] == show_forward(model[0]).splitlines()[2:5]


def test_before_and_after_of_a_graph_module() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.w)

    model = fx.symbolic_trace(Bare())
    lora_fx.inject(model, RULE, torch.randn(2, 4))
    before, _, after = show_forward(model).partition("# after")
    assert "adapted_linear" not in before
    assert "adapted_linear" in after


def test_a_plain_module_says_so() -> None:
    assert show_forward(nn.Linear(2, 2)).startswith("# Linear is not adapted")
