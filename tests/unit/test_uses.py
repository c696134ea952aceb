"""Ways in which programs use weights and models: each sees W, and each gives the right gradient."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lora_fx
from tests.by_hand import branched, check, distance, randomise, run
from tests.odd_models import Tied, TwoNames

EVERYTHING = lora_fx.Policy(lora_fx.Rule(rank=2))
IDS = torch.arange(10).reshape(2, 5)
X = torch.randn(3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def injected(model: nn.Module, *inputs: Any, **how: Any) -> nn.Module:
    lora_fx.inject(model, EVERYTHING, inputs, seed=0, **how)
    randomise(model)
    return model


def tied() -> nn.Module:
    torch.manual_seed(0)
    return Tied().double()


def shares(model: nn.Module) -> bool:
    """Whether embedding and head share W0, A and B."""
    names = ("weight", "lora_A__weight__default", "lora_B__weight__default")
    return all(model.embedding._parameters[n] is model.head._parameters[n] for n in names)


def test_a_tied_embedding_and_head_are_branches_of_one_adapter() -> None:
    model = injected(tied(), IDS)
    assert branched(model) == {"embedding.weight", "head.weight", "body.weight"}
    assert shares(model)
    assert len(lora_fx.parameters(model)) == 4
    check(model, IDS)


def test_a_module_under_two_names_is_adapted_once() -> None:
    model = injected(TwoNames().double(), X)
    assert len(lora_fx.parameters(model)) == 4
    check(model, X)


@pytest.mark.parametrize("first", ["part", "whole"])
def test_a_part_and_its_whole_cannot_both_be_injected(first: str) -> None:
    part = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
    whole = nn.Sequential(part, nn.Linear(5, 2)).double()
    one, other = (part, whole) if first == "part" else (whole, part)
    wanted = run(injected(one, X), X)
    for refused in (lora_fx.plan, lora_fx.inject):
        with pytest.raises(lora_fx.PlanError, match="adapters of the whole model, or none"):
            refused(other, EVERYTHING, X)
    assert torch.equal(run(one, X), wanted)


class Regularised(nn.Module):
    """Reads its weights in Python: their type, their values in the loss, their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.last(torch.tanh(self.first(x.to(self.first.weight.dtype))))
        penalty = self.first.weight.pow(2).sum() + sum(p.abs().sum() for p in (self.last.weight,))
        return x, penalty / self.first.weight.numel()


def test_weights_read_in_python() -> None:
    model = injected(Regularised().double(), X)
    check(model, X)
    with lora_fx.folded(model):
        wanted = model.first.weight.detach().clone()
    torch.testing.assert_close(model.first.weight.detach().as_subclass(Tensor), wanted)
    assert (model.first.weight.dtype, model.first.weight.shape) == (torch.float64, (6, 5))
    assert model.first.weight.requires_grad
    base = dict(model.named_parameters())["first.weight"]
    assert isinstance(base, nn.Parameter)
    assert not torch.equal(base, wanted)
    assert torch.equal(model.get_parameter("first.weight"), base)


class Branching(nn.Module):
    """Takes a branch in training alone, and another by its input's values."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aside = nn.Linear(5, 5), nn.Linear(5, 5)
        self.steps, self.rest = nn.ModuleList(nn.Linear(5, 5) for _ in range(2)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.body(x))
        if self.training:
            x = x + F.dropout(self.aside(x), 0.5)
        while float(x.detach().norm()) > 1.0:
            for step in self.steps:
                x = 0.5 * torch.tanh(step(x))
        return self.rest(x)


def test_branches_taken_in_training_and_by_values() -> None:
    model = Branching().double().train()
    lora_fx.inject(model, EVERYTHING, X, seed=0)
    randomise(model)
    check(model, X)
    check(model, 0.01 * X)


def test_hooks_fire_as_before() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    seen: list[str] = []
    model[0].register_forward_pre_hook(lambda m, args: seen.append("pre"))
    model[0].register_forward_hook(lambda m, args, out: 2 * out)
    model[2].register_full_backward_hook(lambda m, given, got: seen.append("backward"))
    injected(model, X)
    seen.clear()
    model(X).sum().backward()
    assert seen == ["pre", "backward"]
    check(model, X)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5)) for _ in range(2)
        )
        self.reentrant, self.on = reentrant, True
        self.stem = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.on else block(x)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_activation_checkpointing(reentrant: bool, dropout: float) -> None:
    model, x = Checkpointed(reentrant).double(), X.clone().requires_grad_()
    x.grad = torch.ones_like(x)
    model.train()
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2, dropout=dropout)), x, seed=0)
    randomise(model)
    gradients = []
    for on in (True, False):
        model.on = on
        torch.manual_seed(1)
        model.zero_grad()
        model(X).pow(2).sum().backward()
        gradients.append([p.grad.clone() for p in lora_fx.parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    model.on = True
    lora_fx.verify(model, x).raise_for_failure()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert all(torch.equal(p.grad, g) for p, g in zip(lora_fx.parameters(model), gradients[1], strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    model, x = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8)).to(dtype), torch.randn(4, 32)
    injected(model, x.to(dtype))
    assert {p.dtype for p in lora_fx.parameters(model)} == {torch.float32}
    found = model(x.to(dtype))
    assert found.dtype == dtype
    found.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lora_fx.parameters(model))
    with lora_fx.folded(model):
        assert distance(found, model(x.to(dtype))) < tolerance
    lora_fx.verify(model, x.to(dtype)).raise_for_failure()


def test_autocast() -> None:
    model, x = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8)), torch.randn(4, 32)
    injected(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
        with lora_fx.folded(model):
            wanted = model(x)
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert distance(found, wanted) < 2e-2


def test_lazy_modules_are_refused_until_they_have_a_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3)).double()
    for call in (lora_fx.plan, lora_fx.inject):
        with pytest.raises(lora_fx.PlanError, match="Run the model once"):
            call(model, EVERYTHING, X)
    assert type(model[0]) is nn.LazyLinear
    model(X)
    check(injected(model, X), X)


def test_copies_of_every_kind_compute_the_same() -> None:
    model = injected(tied(), IDS)
    wanted = run(model, IDS)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(stream, weights_only=False),
    }
    for how, other in copies.items():
        assert torch.equal(run(other, IDS), wanted), how
        assert shares(other), how
        assert isinstance(other.head, nn.Linear), how
        lora_fx.fold(other)
        assert distance(run(other, IDS), wanted) < 1e-12, how
        assert type(other) is Tied, how
    assert torch.equal(run(model, IDS), wanted)
    assert torch.equal(run(model.share_memory(), IDS), wanted)


def test_functional_call_replaces_any_of_the_parameters() -> None:
    model = injected(tied(), IDS)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    found = torch.func.functional_call(model, dict(other.named_parameters()), (IDS,))
    assert torch.equal(found, other(IDS))
    assert not torch.equal(found, model(IDS))


def test_gradients_of_functions() -> None:
    model = injected(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double(), X)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (X,)).pow(2).sum()

    found = torch.func.grad(loss)(trained)
    wanted = torch.autograd.grad(loss(trained), list(trained.values()))
    assert all(distance(f, w) < 1e-12 for f, w in zip(found.values(), wanted, strict=True))


def test_averaged_models() -> None:
    model = injected(tied(), IDS)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    first = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in lora_fx.parameters(model):
            parameter.add_(1.0)
    average.update_parameters(model)
    assert shares(average.module)
    moved = average.module.body._parameters["lora_B__weight__default"]
    torch.testing.assert_close(moved, first.body._parameters["lora_B__weight__default"] + 0.5)
    average(IDS)


def test_jit_trace() -> None:
    model = injected(tied(), IDS).eval()
    stream = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, IDS), stream)
    stream.seek(0)
    assert distance(torch.jit.load(stream)(IDS), model(IDS)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("make", [tied, lambda: nn.LSTM(5, 4).double()], ids=["tied", "lstm"])
def test_compile(make: Any) -> None:
    model = make()
    inputs = IDS if isinstance(model, Tied) else X
    injected(model, inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=isinstance(model, Tied))
    gradients = []
    for run_it in (compiled, model):
        output = run_it(inputs)
        output = output if isinstance(output, Tensor) else output[0]
        gradients.append(torch.autograd.grad(output.pow(2).sum(), lora_fx.parameters(model)))
    assert all(distance(a, b) < 1e-12 for a, b in zip(*gradients, strict=True))
    torch._dynamo.reset()


def test_export_of_the_injected_model_holds_the_adapters() -> None:
    model = injected(tied(), IDS)
    program = torch.export.export(model, (IDS,))
    assert distance(program.module()(IDS), model(IDS)) < 1e-12


@pytest.mark.parametrize("how", ["symbolic_trace", "export"])
def test_copies_of_graph_modules(how: str) -> None:
    plain = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    graph = (
        torch.fx.symbolic_trace(plain)
        if how == "symbolic_trace"
        else torch.export.export(plain, (X,)).module()
    )
    base = plain(X)
    model = injected(graph, X)
    wanted = model(X)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)) if how == "symbolic_trace" else model,
    ):
        assert torch.equal(other(X), wanted)
        with lora_fx.folded(other):
            assert distance(other(X), wanted) < 1e-12
        with lora_fx.disable_adapter(other):
            assert distance(other(X), base) == 0
        lora_fx.unload(other)
        assert torch.equal(other(X), base)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_function_over_a_modules_forward_follows_its_class(when: str) -> None:
    def wrap(module: nn.Module) -> None:
        inner = module.forward
        module.forward = lambda *args, **kwargs: 2 * inner(*args, **kwargs)

    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double(), torch.randn(3, 6).double()
    base = copy.deepcopy(model)
    wrap(base[2])
    if when == "before":
        wrap(model[2])
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x, seed=0)
    if when == "after":
        wrap(model[2])
    with torch.no_grad():
        for parameter in lora_fx.parameters(model):
            parameter.normal_()
    wanted = model(x)
    assert lora_fx.verify(model, x).ok
    with lora_fx.folded(model):
        torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(model(x), wanted)
    lora_fx.unload(model)
    assert torch.equal(model(x), base(x))
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x, seed=0)
    assert torch.equal(model(x), base(x))
    with torch.no_grad():
        for parameter in lora_fx.parameters(model):
            parameter.normal_()
    wanted = model(x)
    lora_fx.fold(model)
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
