"""The recorder: what it writes down, and that it leaves the model as it was."""

from __future__ import annotations

import copy
import random
import threading
import types
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx.errors import InputError
from lora_fx.passes.examples import tensors_in
from lora_fx.passes.trace import Trace, trace
from tests.whole_replay import assert_replays, replayed


class Wrapped(nn.Module):
    """A function of the input, with a few children and parameters to use."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.w = nn.Parameter(torch.randn(6, 4))
        self.register_buffer("ids", torch.arange(4))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def recorded(function: Callable[[Any, Tensor], Any], x: Tensor | None = None) -> Trace:
    torch.manual_seed(0)
    return trace(Wrapped(function).eval(), torch.randn(3, 4) if x is None else x)


def ops(trace: Trace) -> list[str]:
    return [n.meta["op"] for n in trace.graph.nodes if n.op in {"call_function", "call_method"}]


def calls(trace: Trace, op: str) -> list[fx.Node]:
    return [n for n in trace.graph.nodes if n.meta.get("op") == op]


def write_through_view(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    row = y[1]
    row.mul_(2)
    y[0] = 1
    y[:, 2] += row.sum()
    return y, row, y.t()


def write_two_views(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    left, right = y.chunk(2, 1)
    left.add_(right)
    right.copy_(left)
    return m.b(y), left * 2, right


def write_into_view_of_view(m: Any, x: Tensor) -> Any:
    y = torch.zeros(2, 3, 4)
    y[0] = m.a(x)
    z = y.transpose(0, 1)
    z[1][0].fill_(3.0)
    y.view(-1)[5] = 7
    return y, z


def write_with_out(m: Any, x: Tensor) -> Any:
    y = torch.empty(3, 4)
    values, places = torch.empty(3), torch.empty(3, dtype=torch.long)
    torch.mul(m.a(x), 2, out=y)
    torch.max(y, 1, out=(values, places))
    return y, values, places


def write_into_the_input(m: Any, x: Tensor) -> Any:
    x.relu_()
    return m.a(x) + x


def grow_a_metadata_view(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    y.unsqueeze_(0)
    y.add_(1)
    return y.squeeze(0) + x


def reassign_data(m: Any, x: Tensor) -> Any:
    y = x.clone()
    y.data = m.a(x)
    return y * 2


def foreach(m: Any, x: Tensor) -> Any:
    one, two = m.a(x), m.b(x)
    torch._foreach_mul_([one, two], 0.5)
    return x + torch.stack([m.a(x), m.b(x)]).sum(0)


def in_place_functions(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    z = y[:, :2]
    F.relu(y, inplace=True)
    F.leaky_relu(z, 0.1, True)
    return z, y


def scalar_arithmetic(m: Any, x: Tensor) -> Any:
    y = 1 - m.a(x)
    y = 2 / (y + 3) ** 2
    y -= 0.5
    y @= m.w[:4]
    return 3 + -y, (y > 0).float(), ~(y > 0)


def nested_results(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    values, places = y.max(1)
    top = torch.topk(y, 2)
    parts = torch.split(y, [1, 2])
    return {
        "a": values,
        "b": [places, (top.values, top.indices)],
        "c": parts[1],
        "n": 3,
        "s": "text",
        "none": None,
    }


def created_inside(m: Any, x: Tensor) -> Any:
    y = torch.arange(4, dtype=x.dtype) + torch.tensor(2.0) + x.new_ones(4)
    return m.a(x + y) * torch.full((4,), 0.5) + m.ids


def slices(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return y[..., None], y[1:, ::2], y[[0, 2]], y[m.ids[:2]], y[y > 0].sum(), y[:, m.ids.flip(0)]


def under_vmap(m: Any, x: Tensor) -> Any:
    return torch.vmap(lambda row: m.a(row) * 2 + row.sum())(x)


def under_checkpoint(m: Any, x: Tensor) -> Any:
    y = checkpoint(m.a, x, use_reentrant=False)
    return checkpoint(m.b, y, use_reentrant=True)


def shared_parameter(m: Any, x: Tensor) -> Any:
    return F.linear(F.linear(x, m.a.weight), m.a.weight.data) + F.linear(x, m.a.weight.detach()) + m.a(x)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x * 2


def autograd_function(m: Any, x: Tensor) -> Any:
    y: Tensor = Double.apply(m.a(x))  # type: ignore[no-untyped-call]
    return m.b(y)


def aten_spelling(m: Any, x: Tensor) -> Any:
    return torch.ops.aten.add.Tensor(torch.ops.aten.linear(x, m.a.weight, m.a.bias), x)


def complex_views(m: Any, x: Tensor) -> Any:
    z = torch.view_as_complex(m.a(x).reshape(3, 2, 2))
    return torch.view_as_real(z * z).flatten(1)


FUNCTIONS = [
    write_through_view,
    write_two_views,
    write_into_view_of_view,
    write_with_out,
    write_into_the_input,
    grow_a_metadata_view,
    reassign_data,
    in_place_functions,
    foreach,
    scalar_arithmetic,
    nested_results,
    created_inside,
    slices,
    under_checkpoint,
    shared_parameter,
    autograd_function,
    aten_spelling,
    complex_views,
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_graph_computes_what_the_model_returned(function: Callable[[Any, Tensor], Any]) -> None:
    traced = recorded(function)
    assert_replays(traced)
    assert traced.holes == ()
    traced.graph.lint()


@pytest.mark.parametrize("function", [*FUNCTIONS, under_vmap])
def test_the_model_and_its_input_are_left_alone(function: Callable[[Any, Tensor], Any]) -> None:
    x = torch.randn(3, 4)
    model = Wrapped(function)
    kept = x.clone(), copy.deepcopy(model.state_dict())
    trace(model, x)
    assert torch.equal(x, kept[0])
    assert all(torch.equal(v, kept[1][k]) for k, v in model.state_dict().items())


def test_a_replay_that_is_wrong_is_seen() -> None:
    """The check behind the tests above fails on one changed constant and on one lost write."""
    traced = recorded(write_through_view)
    scale = next(n for n in traced.graph.nodes if n.target == "mul_")
    scale.args = (scale.args[0], 3)
    with pytest.raises(AssertionError, match="off by"):
        assert_replays(traced)


def test_facts_of_a_call() -> None:
    traced = recorded(lambda m, x: m.b(torch.matmul(m.a(x), m.w.t()).sum(1, keepdim=True) + m.w[0]))
    first, second = calls(traced, "linear")
    assert (first.meta["module"], second.meta["module"]) == ("a", "b")
    assert first.meta["shape"] == (3, 4)
    assert first.meta["dtype"] is torch.float32
    assert first.meta["floating"] is True
    assert first.meta["device"] == torch.device("cpu")
    (matmul,) = calls(traced, "matmul")
    assert matmul.meta["module"] == ""
    view = matmul.all_input_nodes[1]
    assert (view.op, view.target) == ("call_method", "t")
    assert view.meta["shape"] == (4, 6)
    assert view.meta["stride"] == (1, 4)
    weight = view.all_input_nodes[0]
    assert (weight.op, weight.target, weight.meta["parameter"]) == ("get_attr", "w", "w")
    assert view.meta["memory"] == weight.meta["memory"] != matmul.meta["memory"]


def test_values_of_integers_are_kept_and_of_floats_are_not() -> None:
    traced = recorded(lambda m, x: x + (m.ids * 2 > 3))
    assert torch.equal(calls(traced, "gt")[0].meta["value"], torch.arange(4) * 2 > 3)
    assert "value" not in calls(traced, "add")[0].meta


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda m, x: torch.matmul(x, m.a.weight), "matmul"),
        (lambda m, x: x.matmul(m.a.weight), "matmul"),
        (lambda m, x: x @ m.a.weight, "matmul"),
        (lambda m, x: torch.ops.aten.matmul.default(x, m.a.weight), "matmul"),
        (lambda m, x: torch.ops.aten.matmul(x, m.a.weight), "matmul"),
        (lambda m, x: torch._softmax(x, 1, False), "softmax"),  # type: ignore[attr-defined]
        (lambda m, x: F.softmax(x, 1), "softmax"),
        (lambda m, x: x.softmax(1), "softmax"),
        (lambda m, x: 1 + x, "add"),
        (lambda m, x: x.T, "T"),
        (lambda m, x: x.data, "data"),
    ],
)
def test_canonical_names(function: Callable[[Any, Tensor], Any], op: str) -> None:
    assert ops(recorded(function)) == [op]


def test_calls_without_a_tensor_result_are_left_out() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if x.shape[0] == 3 and x.size(1) == 4 and x.dim() and x.sum().item() < 1e9 and torch.is_tensor(x):
            return x.contiguous().float().to(x.device).requires_grad_(False)
        return m.a(x)

    traced = recorded(forward)
    assert ops(traced) == ["sum"]
    assert next(n for n in traced.graph.nodes if n.op == "output").args[0].op == "placeholder"


def test_attention_is_one_call() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    traced = trace(model, torch.randn(2, 3, 8))
    assert torch.backends.mha.get_fastpath_enabled() is before
    attention = calls(traced, "multi_head_attention_forward")
    assert [n.meta["module"] for n in attention] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert len(calls(traced, "linear")) == 4
    assert_replays(traced)


class Inputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, x: Tensor, pair: Any = None, *, extra: Any = None, scale: float = 1.0) -> Any:
        y = self.l(x) * scale
        for t in pair or ():
            y = y + t
        return y if extra is None else y + extra["deep"][0]["t"]


@dataclass
class Sized:
    t: Tensor
    size: int = 3


def test_containers_of_inputs() -> None:
    x = torch.randn(3, 4)
    given = ((x, [x + 1, x + 2]), {"extra": {"deep": [{"t": x + 3}]}, "scale": 2.0})
    traced = trace(Inputs(), given)
    names = [n.target for n in traced.graph.nodes if n.op == "placeholder"]
    assert names == ["x", "pair_0", "pair_1", "extra_deep_0_t"]
    assert_replays(traced)
    assert [n.meta["shape"] for n in traced.graph.nodes if n.op == "placeholder"] == [(3, 4)] * 4


@pytest.mark.parametrize(
    "given",
    [
        torch.ones(2, 4),
        (torch.ones(2, 4),),
        {"x": torch.ones(2, 4)},
        OrderedDict(x=torch.ones(2, 4)),
        ((torch.ones(2, 4),), {}),
        ([torch.ones(2, 4)], {"scale": 1.0}),
        ((), {"x": torch.ones(2, 4)}),
        (torch.ones(2, 4), None),
    ],
)
def test_forms_of_example_inputs(given: Any) -> None:
    traced = trace(Inputs(), given)
    assert [n.target for n in traced.graph.nodes if n.op == "placeholder"] == ["x"]
    assert traced.examples == "given"


class Looped(nn.Module):
    """A module that is called several times, through two names, and with a data-dependent branch."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = self.one
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)])
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.one.weight

    def forward(self, x: Tensor) -> Any:
        for _ in range(3):
            x = self.two(x)
        if float(x.sum()) > 1e9:
            x = x * 0
        for block in self.blocks:
            x = block(x)
        return OrderedDict(y=self.tied(x))


def test_one_get_attr_for_a_shared_and_tied_parameter() -> None:
    traced = trace(Looped(), torch.randn(2, 4))
    assert [n.target for n in traced.graph.nodes if n.op == "get_attr" and "one" in n.target] == [
        "one.weight",
        "one.bias",
    ]
    assert [n.meta["module"] for n in calls(traced, "linear")] == ["one"] * 3 + [
        "blocks.0.0",
        "blocks.1.0",
        "tied",
    ]
    assert_replays(traced)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_parametrized_weights_are_computed_by_recorded_calls(norm: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(norm(nn.Linear(4, 4))).eval()
    traced = trace(model, torch.randn(2, 4))
    (linear,) = calls(traced, "linear")
    assert linear.all_input_nodes[1].op != "get_attr"
    assert traced.holes == ()


def test_spectral_norm_in_train_mode_keeps_its_vectors() -> None:
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)).train()
    before = copy.deepcopy(model.state_dict())
    trace(model, torch.randn(2, 4))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Moody(nn.Module):
    """Everything that a run may leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.table = nn.Embedding(5, 4, max_norm=0.1)
        self.drop = nn.Dropout(0.5)
        self.steps = 0
        self.seen: list[Tensor] = []
        self.memo: dict[str, Any] = {"a": 1}
        self.cache = torch.zeros(3, 4)
        self.fail = False
        self.register_buffer("count", torch.zeros(()))
        self.note: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.seen.append(x)
        self.memo["b"] = self.memo.pop("a")
        self.cache[:2] = 1
        self.count += 1
        self.note = x
        self.count = self.count + 1
        self.new = x
        y = self.drop(self.norm(x)) + torch.rand(3, 4) + self.table(torch.arange(3)) + self.cache
        self.register_forward_hook(lambda *_: None)
        self.norm.eval()
        if self.fail:
            raise RuntimeError("gave up")
        return y


@pytest.mark.parametrize("fail", [False, True])
def test_nothing_is_left_behind(fail: bool) -> None:
    model = Moody().train()
    model.fail = fail
    count, cache = model.count, model.cache
    attributes = {path: dict(m.__dict__) for path, m in model.named_modules()}
    state, rng, table = (
        copy.deepcopy(model.state_dict()),
        torch.get_rng_state(),
        model.table.weight.detach().clone(),
    )
    hooks = dict(module_hooks._global_forward_hooks), dict(module_hooks._global_forward_pre_hooks)
    if fail:
        with pytest.raises(InputError, match="gave up") as caught:
            trace(model, torch.randn(3, 4))
        assert isinstance(caught.value.__cause__, RuntimeError)
    else:
        # The random numbers that make the input are drawn before: compare with the state after them.
        x = torch.randn(3, 4)
        rng = torch.get_rng_state()
        trace(model, x)
        assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.table.weight, table)
    assert model.count is count
    assert model.cache is cache
    assert float(cache.abs().sum()) == 0
    assert (model.steps, model.seen, model.memo, model.note) == (0, [], {"a": 1}, None)
    assert model.norm.training
    assert not model._forward_hooks
    for path, module in model.named_modules():
        assert module.__dict__.keys() == attributes[path].keys()
        assert all(module.__dict__[k] is v for k, v in attributes[path].items())
    assert (module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks) == hooks


def test_gradients_and_flags_are_left_alone() -> None:
    model = nn.Linear(4, 4)
    model.weight.requires_grad_(False)
    model(torch.randn(2, 4)).sum().backward()
    before = model.bias.grad
    trace(model, torch.randn(2, 4))
    assert model.bias.grad is before
    assert model.weight.grad is None
    assert [p.requires_grad for p in model.parameters()] == [False, True]


class Fails(nn.Module):
    def __init__(self, inner: bool) -> None:
        super().__init__()
        self.child = nn.Sequential(nn.Linear(4, 4), nn.Linear(3, 3))
        self.inner = inner
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.inner:
            return self.child(x)
        try:
            x = self.child(x)
        except RuntimeError:
            x = x + 1
        return self.last(x) + x


def test_the_error_of_the_model_is_chained_and_placed() -> None:
    with pytest.raises(InputError, match=r"child\.1.*shapes cannot be multiplied") as caught:
        trace(Fails(inner=True), torch.randn(2, 4))
    assert "shapes cannot be multiplied" in str(caught.value.__cause__)


def test_the_module_path_is_right_after_an_error_that_the_model_catches() -> None:
    traced = trace(Fails(inner=False), torch.randn(2, 4))
    assert [(n.meta["op"], n.meta["module"]) for n in traced.graph.nodes if n.op.startswith("call")] == [
        ("linear", "child.0"),
        ("add", ""),
        ("linear", "last"),
        ("add", ""),
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.randn(2, 5), "shapes cannot be multiplied"),
        ((torch.randn(2, 4), 1, 2), "positional argument"),
        ({"y": torch.randn(2, 4)}, "unexpected keyword"),
        ([torch.randn(2, 4)], "got a list"),
        (None, "dummy_inputs"),
        (3, "got a int"),
    ],
)
def test_wrong_example_inputs(given: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        trace(nn.Linear(4, 4), given)


def test_inputs_that_the_model_brings() -> None:
    class Lightning(nn.Linear):
        example_input_array = torch.randn(2, 4)

    class Hugging(nn.Linear):
        main_input_name = "input"

        @property
        def dummy_inputs(self) -> dict[str, Tensor]:
            return {"input": torch.randn(2, 4)}

    class Other(Hugging):
        main_input_name = "pixel_values"

    assert trace(Lightning(4, 4)).examples == "Lightning.example_input_array"
    assert trace(Hugging(4, 4)).examples == "Hugging.dummy_inputs"
    with pytest.raises(InputError):
        trace(Other(4, 4))


def test_meta_and_fake_tensors() -> None:
    with torch.device("meta"):
        model = Looped.__new__(Looped)
        nn.Module.__init__(model)
        model.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model.forward = lambda x: model.net(x) + torch.arange(2, device=x.device)  # type: ignore[method-assign]
    for x in (torch.randn(3, 4), torch.randn(3, 4, device="meta")):
        traced = trace(model, x)
        assert [n.meta["shape"] for n in calls(traced, "linear")] == [(3, 4), (3, 2)]
        assert not any("value" in n.meta for n in traced.graph.nodes)
    with FakeTensorMode():
        fake = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        x = torch.randn(3, 4)
    traced = trace(fake, x)
    assert [n.meta["shape"] for n in calls(traced, "linear")] == [(3, 4), (3, 2)]


def test_a_real_model_under_a_fake_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = copy.deepcopy(model.state_dict())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        traced = trace(model, mode.from_tensor(torch.randn(3, 4)))
    assert "batch_norm" in ops(traced)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_run_that_brings_the_compiler_in_is_recorded_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """flex_attention imports the compiler, compiles itself with it, and takes no gradients on a CPU."""
    imported: dict[str, object] = {}
    stances: list[str] = []
    monkeypatch.setattr("lora_fx.passes.trace.sys", types.SimpleNamespace(modules=imported))

    def compiles(m: Any, x: Tensor) -> Any:
        imported["torch._dynamo"] = torch._dynamo
        stances.append(torch._dynamo.eval_frame._stance.stance)
        if torch.is_grad_enabled() or stances[-1] != "force_eager":
            raise RuntimeError("compiled")
        return m.a(x)

    assert ops(recorded(compiles)) == ["linear"]
    assert stances == ["default", "force_eager"]


def test_a_call_in_place_is_one_in_inference_mode_too() -> None:
    def program(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        F.silu(y[:, 2:], inplace=True)
        return y

    with torch.inference_mode():
        traced = recorded(program)
        torch.testing.assert_close(replayed(traced), traced.model(traced.args[0]))


def test_compiled_models_are_recorded_as_they_are_written() -> None:
    inner = nn.Linear(4, 4)
    inner.compile()
    model = nn.Sequential(inner, torch.compile(nn.Linear(4, 2)))
    traced = trace(model, torch.randn(3, 4))
    assert [n.meta["module"] for n in calls(traced, "linear")] == ["0", "1._orig_mod"]
    assert_replays(traced)


def test_a_packed_sequence_is_one_argument() -> None:
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(2, 3, 4), [3, 2], batch_first=True)
    traced = trace(nn.GRU(4, 6, batch_first=True), packed)
    assert "gru" in ops(traced)
    assert next(n.target for n in traced.graph.nodes if n.op == "placeholder") == "input_0"


def test_sparse_buffers() -> None:
    model = Wrapped(lambda m, x: torch.sparse.mm(m.adjacency, m.a(x)))
    model.register_buffer("adjacency", torch.eye(3).to_sparse())
    traced = trace(model, torch.randn(3, 4))
    assert ops(traced) == ["linear", "sparse_mm"]
    assert_replays(traced)


class Slotted:
    __slots__ = ("inner", "unset")

    def __init__(self, inner: Any) -> None:
        self.inner = inner


def test_outputs_in_slots_and_sets() -> None:
    traced = recorded(lambda m, x: [Slotted({"y": m.a(x)}), {m.b(x)}])
    (output,) = next(n for n in traced.graph.nodes if n.op == "output").args
    assert list(output) == ["0.inner.y", "1.0"]


def test_holes_are_named() -> None:
    class Holed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.inner.table = [torch.ones(4), torch.full((4,), 2.0)]

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x) + self.inner.table[1]
            return y * torch.Tensor([1.0, 2.0, 3.0, 4.0])

    traced = trace(Holed(), torch.randn(2, 4))
    assert len(traced.holes) == 2
    assert "float32 (4,), the attribute 'inner.table[1]', read by add in ''" in traced.holes[0]
    assert "of unknown origin, read by mul" in traced.holes[1]
    assert [n.target for n in traced.graph.nodes if n.op == "get_attr" and "parameter" not in n.meta] == [
        "_constant_0",
        "_constant_1",
    ]
    assert_replays(traced)


def test_a_view_of_a_weight_made_before_the_run_leads_to_it() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 4))
            self.part = self.w.detach()[2:5]

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.part)

    traced = trace(Cached(), torch.randn(2, 4))
    assert traced.holes == ()
    assert ops(traced) == ["as_strided", "linear"]
    assert_replays(traced)


def test_weak_memory() -> None:
    """No activation outlives its use: the recorder keeps none."""
    counts: list[int] = []

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(20)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model = Deep()
    storages: list[Any] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        storages.append(StorageWeakRef(output.untyped_storage()))
        counts.append(sum(not s.expired() for s in storages))

    for layer in model.layers:
        layer.register_forward_hook(watch)
    trace(model, torch.randn(2, 4))
    assert max(counts) <= 3


def test_other_threads_do_not_disturb() -> None:
    other, stop = nn.Linear(4, 4), threading.Event()

    def busy() -> None:
        with torch.no_grad():
            while not stop.is_set():
                other(torch.ones(1, 4))

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(30)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        traced = trace(Slow(), torch.randn(2, 4))
    finally:
        stop.set()
        thread.join()
    assert [n.meta["module"] for n in calls(traced, "linear")] == [f"layers.{i}" for i in range(30)]


def test_lazy_modules_are_initialised_in_a_copy() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    traced = trace(model, torch.randn(2, 5))
    assert isinstance(model[0], nn.LazyLinear)
    assert traced.model is model
    assert [n.meta["shape"] for n in traced.graph.nodes if n.meta.get("parameter") == "0.weight"] == [(3, 5)]


def test_a_graph_module_is_run_like_a_module() -> None:
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    traced = trace(model, torch.randn(2, 4))
    assert [n.meta["module"] for n in calls(traced, "linear")] == ["0", "2"]
    assert_replays(traced)


def test_an_exported_module_is_recorded() -> None:
    program = torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),))
    traced = trace(program.module(), torch.randn(2, 4))
    assert ops(traced) == ["linear"]
    assert [n.meta["parameter"] for n in traced.graph.nodes if "parameter" in n.meta] == ["weight", "bias"]


def test_objects_given_and_returned() -> None:
    class Cache:
        def __init__(self) -> None:
            self.keys: list[Tensor] = []

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k = nn.Linear(4, 4)

        def forward(self, x: Tensor, cache: Cache) -> Any:
            cache.keys.append(self.k(x))
            return Sized(x + 1), cache

    cache = Cache()
    traced = trace(Caching(), (torch.randn(2, 4), cache))
    assert cache.keys == []
    (output,) = next(n for n in traced.graph.nodes if n.op == "output").args
    assert list(output) == ["0.t", "1.keys.0"]
    assert output["1.keys.0"].meta["op"] == "linear"


def test_a_printed_trace_can_be_read() -> None:
    text = str(trace(Looped().eval(), torch.randn(2, 4)))
    lines = text.splitlines()
    assert lines[0] == "Trace of Looped: 9 calls in eval mode, inputs: given"
    assert lines[1] == "  x: float32[2, 4]"
    assert "blocks.0.1 (ReLU)" in lines
    assert "    linear_3: float32[2, 4] = linear(linear_2, blocks.0.0.weight, blocks.0.0.bias)" in lines
    assert lines[-1] == "    return {y: linear_5}"


def test_train_mode_is_recorded_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    traced = trace(model, torch.randn(3, 4))
    assert calls(traced, "dropout")
    assert "train mode" in str(traced)
    assert ops(trace(model.eval(), torch.randn(3, 4))) == ["linear", "batch_norm"]


def test_statistics_written_by_a_call_are_seen_when_read() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4, momentum=None)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm.running_mean

    traced = trace(Twice().train(), torch.randn(3, 4))
    (add,) = calls(traced, "add")
    assert [n.meta["op"] for n in add.all_input_nodes] == ["batch_norm", "after"]
    replayed(traced)


def test_inference_mode_of_the_caller() -> None:
    with torch.inference_mode():
        traced = recorded(write_through_view, torch.randn(3, 4))
        assert ops(traced)[0] == "linear"
        assert_replays(traced)


@torch.jit.script
def scripted_gate(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * x


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)))
        self.traced = torch.jit.trace(nn.Linear(4, 4), torch.randn(2, 4))

    def forward(self, x: Tensor) -> Any:
        return self.traced(self.scripted(scripted_gate(self.a(x))))


def test_the_second_net_sees_into_compiled_code() -> None:
    traced = trace(Compiled(), torch.randn(2, 4))
    assert traced.holes == ()
    assert ops(traced) == ["linear", "sigmoid", "mul", "t", "addmm", "relu_", "t", "addmm"]
    assert [
        n.meta["parameter"] for n in traced.graph.nodes if n.meta.get("parameter", "").endswith("weight")
    ] == [
        "a.weight",
        "scripted.0.weight",
        "traced.weight",
    ]
    assert_replays(traced)


def test_a_model_that_refuses_the_second_net_keeps_the_first_record(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_fx.passes import second_net

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("no rule for this operator")

    monkeypatch.setattr(second_net.SecondNet, "__torch_dispatch__", refuse)
    traced = trace(Compiled(), torch.randn(2, 4))
    assert ops(traced) == ["linear"]
    assert "no rule for this operator" in traced.holes[-1]


def random_program(seed: int) -> Callable[[Any, Tensor], Any]:
    """Draw a program of views, writes through them, and reads of whatever has gone stale."""

    def view(rng: random.Random, t: Tensor) -> Tensor:
        axis = rng.randrange(t.dim()) if t.dim() else 0
        choices: list[Callable[[], Tensor]] = [
            lambda: t.view(t.shape),
            lambda: t.unsqueeze(0),
            t.detach,
        ]
        if t.dim():
            start = rng.randrange(t.shape[axis])
            choices += [
                lambda: t.narrow(axis, start, t.shape[axis] - start),
                lambda: t.select(axis, start),
                lambda: t.transpose(0, axis),
                lambda: t.chunk(2, axis)[0],
                lambda: t[..., ::2],
            ]
        return rng.choice(choices)()

    def write(rng: random.Random, t: Tensor, other: Tensor) -> None:
        choices: list[Callable[[], Any]] = [
            lambda: t.mul_(0.5),
            lambda: t.add_(other.mean()),
            lambda: t.copy_(other.sum()),
            lambda: t.__setitem__(..., other.amax()),
            lambda: torch.sub(t, other.mean(), out=t),
            lambda: F.relu(t, inplace=True),
        ]
        rng.choice(choices)()

    def program(m: Any, x: Tensor) -> Any:
        rng = random.Random(seed)
        held = [m.a(x), x.clone().view(2, 2, 3), torch.ones(2, 6), x]
        for _ in range(12):
            one, other = rng.choice(held), rng.choice(held)
            if rng.random() < 0.5:
                held.append(view(rng, one))
            elif rng.random() < 0.7:
                write(rng, one, other)
            else:
                held.append(one * other.mean() + 1)
        return held

    return program


@pytest.mark.parametrize("seed", range(80))
def test_random_writes_through_views(seed: int) -> None:
    program = random_program(seed)
    x = torch.randn(3, 4)
    traced = recorded(program, x)
    assert traced.holes == ()
    kept = x.clone()
    values = [t for t in pytree.tree_leaves(replayed(traced)) if isinstance(t, Tensor)]
    assert torch.equal(x, kept)
    with torch.no_grad():
        wanted = [t for _, t in tensors_in(traced.model(x.clone()))]
    assert len(values) == len(wanted)
    for found, expected in zip(values, wanted, strict=True):
        # A clone lies closer in memory than the view it was made of: sums may round otherwise.
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_examples_are_refused_and_nested_inputs_taken(layout: torch.layout) -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 4))
    parts = [torch.randn(3, 300), torch.randn(2, 300)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    policy = lora_fx.Policy(lora_fx.Rule(rank=2))
    with pytest.raises(InputError, match=r"nested tensor.*to_padded_tensor"):
        lora_fx.inject(model, policy, nested)
    lora_fx.inject(model, policy, torch.nested.to_padded_tensor(nested, 0.0), seed=0)
    with torch.no_grad():
        for parameter in lora_fx.parameters(model):
            parameter.normal_(std=0.1)
        for found, part in zip(model(nested).unbind(), parts, strict=True):
            torch.testing.assert_close(found, model(part))
