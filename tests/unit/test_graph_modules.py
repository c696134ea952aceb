"""A GraphModule or an exported program is rewritten in its own graph, and given back as it was."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import lora_fx
from tests.odd_models import ODD_MODELS, Fused

EVERYTHING = lora_fx.Policy(lora_fx.Rule(rank=2))
NAMES = [name for name in ODD_MODELS if name != "hooked"]  # an instance's own forward is lost in tracing


def graph_of(name: str, how: str) -> tuple[fx.GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    make, inputs = ODD_MODELS[name]
    model, x = make().eval().requires_grad_(False), inputs()
    if how == "symbolic_trace":
        return fx.symbolic_trace(model), x
    exported = torch.export.export(model, (x,)).module()
    assert isinstance(exported, fx.GraphModule)
    return exported, x


@pytest.mark.parametrize("how", ["symbolic_trace", "export"])
@pytest.mark.parametrize("name", NAMES)
def test_graph_modules(name: str, how: str) -> None:
    model, x = graph_of(name, how)
    with torch.no_grad():
        base, code = model(x), model.code
        assert lora_fx.inject(model, EVERYTHING, x, seed=0) is model
        # torch picks other kernels for attention's traced pieces: equal to rounding there.
        assert torch.allclose(model(x), base, rtol=0, atol=1e-7 if name == "multi-head" else 0)
        lora_fx.verify(model, x).raise_for_failure()
        with lora_fx.folded(model):
            assert model.code == code
    lora_fx.unload(model)
    assert model.code == code
    assert torch.equal(model(x), base)
    assert not any("lora" in key for key in model.state_dict())


def test_an_exported_program_itself() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    program = torch.export.export(Fused().eval(), (x,))
    model = lora_fx.inject(program, lora_fx.Policy.paper(2), x)
    assert isinstance(model, fx.GraphModule)
    assert "adapted_linear" in model.code
    parts = lora_fx.plan(program, lora_fx.Policy.paper(2), x)["qkv.weight"].parts
    assert [(part.role, part.rows) for part in parts] == [("q", ((0, 16),)), ("v", ((32, 48),))]


def test_calls_of_modules_stay_calls_of_modules() -> None:
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    lora_fx.inject(model, EVERYTHING, torch.randn(2, 4))
    assert [node.op for node in model.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
