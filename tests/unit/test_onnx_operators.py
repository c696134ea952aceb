"""What torch's exporter has no translation for is translated, and computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.passes.onnx_operators import translations

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Checked(nn.Module):
    """Asks of its inputs, as models do that check them, whether all of them are below a bound."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        fine = torch.ops.aten._is_all_true.default(x < 10)
        return self.linear(x) * torch.where(fine, 1.0, 2.0)


def test_whether_all_is_true(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lora_fx.inject(Checked().eval(), lora_fx.Policy(lora_fx.Rule(rank=2)), X, seed=0)
    with torch.no_grad():
        for parameter in lora_fx.parameters(model):
            parameter.normal_()
    lora_fx.export_onnx(model, tmp_path / "task.onnx", X).raise_for_failure()
    session = lora_fx.session(tmp_path / "task.onnx", providers=["CPUExecutionProvider"])
    (name,) = [each.name for each in session.get_inputs()]
    for case in (X, X.index_fill(0, torch.tensor([1]), 20.0)):
        wanted = model(case).detach().numpy()
        np.testing.assert_allclose(session.run(None, {name: case.numpy()})[0], wanted, rtol=1e-5, atol=1e-6)


def test_each_is_one_that_the_exporter_lacks() -> None:
    """One that it has learnt is to go from the table."""
    with pytest.raises(Exception, match=r"No ONNX function found.*_is_all_true"):
        torch.onnx.export(Checked().eval(), (X,), dynamo=True, verbose=False)
    assert list(translations()) == [torch.ops.aten._is_all_true.default]
