"""Inputs made again from what their producer saved: the same bits, fewer bytes, and when not to."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_fx.kinds import costs, producers
from lora_fx.kinds.base import LivePart
from lora_fx.kinds.linear import adapted_linear
from lora_fx.kinds.producers import remade, remake_inputs, remember_norms

WIDTH = 16


@pytest.fixture(autouse=True)
def fused_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(costs, "SMALL_PRODUCT", 0)


class RMSNorm(nn.Module):
    """As the Llama family writes it: products, and casts around them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Gated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x * 2) * (x + 1)


class TanhGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.04 * torch.pow(x, 3.0))))


class Heads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.view(*x.shape[:2], 4, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(x.shape)


PRODUCERS: dict[str, Callable[[], nn.Module]] = {
    "layer_norm": lambda: nn.LayerNorm(WIDTH, eps=1e-6),
    "layer_norm_without_bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "rms_norm": RMSNorm,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "composite_gelu": TanhGelu,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "gated": Gated,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "softmax": lambda: nn.Softmax(-1),
    "attention": Heads,
    "dropout_of_norm": lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Dropout(0.2)),
    "norm_in_two_views": lambda: nn.Sequential(
        nn.LayerNorm(WIDTH), nn.Flatten(0, 1), nn.Unflatten(0, (2, -1))
    ),
}


class Consumers(nn.Module):
    """q, k, v of one input: three consumers of what one producer made."""

    def __init__(self, producer: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.producer = producer
        for p in self.parameters():
            p.data += 0.1 * torch.randn_like(p)
        self.requires_grad_(False).to(dtype)
        self.weight = torch.randn(3, WIDTH, WIDTH).to(dtype)
        self.a = nn.Parameter(torch.randn(3, 2, WIDTH))
        self.b = nn.Parameter(torch.randn(3, WIDTH, 2))
        remember_norms(self)

    def forward(self, x: Tensor) -> Tensor:
        made = self.producer(x * 1.0)
        branches = zip(self.weight, self.a, self.b, strict=True)
        ys = [adapted_linear(made, w, lora=(LivePart(a, b, 0.5),)) for w, a, b in branches]
        return (ys[0] * ys[1] + ys[2]).float().sin()


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(model(x).sum(), [x, *trained]))


def saved_bytes(run: Callable[[], Tensor], apart: nn.Module) -> int:
    """The bytes of distinct storages that autograd keeps, parameters left out."""
    held: dict[int, tuple[int, Tensor]] = {}
    known = {p.untyped_storage().data_ptr() for p in apart.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in held.values())


@pytest.mark.parametrize("name", sorted(PRODUCERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_same_bits(name: str, dtype: torch.dtype) -> None:
    model = Consumers(PRODUCERS[name](), dtype)
    x = torch.randn(2, 5, WIDTH).to(dtype).requires_grad_()
    torch.manual_seed(1)
    assert remade(model.producer(x * 1.0)) is not None
    found = gradients(model, x)
    with remake_inputs(False):
        assert remade(model.producer(x * 1.0)) is None
        wanted = gradients(model, x)
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["layer_norm", "gelu", "gated", "rms_norm"])
def test_the_input_is_not_saved(name: str) -> None:
    model, x = Consumers(PRODUCERS[name]()), torch.randn(64, 5, WIDTH, requires_grad=True)
    made = 4 * x.numel()
    lean = saved_bytes(lambda: model(x), model)
    with remake_inputs(False):
        full = saved_bytes(lambda: model(x), model)
    assert full - lean == made


@pytest.mark.parametrize("name", ["layer_norm", "gelu"])
def test_autocast_makes_the_cast_input_again(name: str) -> None:
    model, x = Consumers(PRODUCERS[name]()), torch.randn(64, 5, WIDTH, requires_grad=True)

    def run() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        return list(torch.autograd.grad(y.sum(), [x, model.a, model.b]))

    found = run()
    with remake_inputs(False):
        wanted = run()
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


def test_unknown_producers_and_leaves_are_saved() -> None:
    x = torch.randn(3, WIDTH, requires_grad=True)
    assert remade(x) is None
    assert remade(x + 1) is None
    assert remade((x * 2).chunk(2)[1]) is None
    assert remade(F.layer_norm(x, (WIDTH,), torch.ones(WIDTH), torch.zeros(WIDTH))) is None, "unknown epsilon"


def test_weights_that_another_may_free_are_not_relied_on() -> None:
    norm = nn.LayerNorm(WIDTH)
    x = torch.randn(3, WIDTH, requires_grad=True)
    assert remade(norm(x)) is None
    remember_norms(norm)
    assert remade(norm(x)) is not None
    norm.weight = nn.Parameter(norm.weight.detach().clone())
    assert remade(norm(x)) is None


def test_double_backward_goes_through_the_producer() -> None:
    model = Consumers(nn.LayerNorm(WIDTH).double(), torch.float64).double()
    x = torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        made = F.gelu(model.producer(x * 1.0))
        return adapted_linear(made, model.weight[0], lora=(LivePart(a, b, 0.5),))

    inputs = (x, model.a[0].detach().requires_grad_(), model.b[0].detach().requires_grad_())
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["layer_norm", "gelu", "attention"])
def test_checkpointing(name: str, reentrant: bool) -> None:
    model, x = Consumers(PRODUCERS[name]()), torch.randn(4, 5, WIDTH, requires_grad=True)
    wanted = gradients(model, x)
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    found = [x.grad, model.a.grad, model.b.grad]
    assert all(f is not None and torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


def test_a_producer_inside_a_checkpoint_and_consumers_outside() -> None:
    model, x = Consumers(nn.GELU()), torch.randn(4, 5, WIDTH, requires_grad=True)
    wanted = gradients(model, x)
    model.producer = nn.Sequential(Checkpointed(model.producer))
    found = gradients(model, x)
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def test_offloading_that_unpacks_once_keeps_its_own_copies() -> None:
    model, x = Consumers(nn.GELU()), torch.randn(4, 5, WIDTH, requires_grad=True)
    wanted, kept = gradients(model, x), dict[int, Tensor]()

    def pack(tensor: Tensor) -> int:
        kept[len(kept)] = tensor.clone()
        return len(kept) - 1

    # An empty place stays, so that numbers are not given twice.
    def unpack(number: int) -> Tensor:
        tensor = kept[number]
        assert tensor.numel() >= 0
        kept[number] = torch.empty(0, requires_grad=False).as_subclass(Gone)
        assert type(tensor) is Tensor, "unpacked twice"
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        found = gradients(model, x)
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


class Gone(Tensor):
    pass


def test_hooks_that_change_what_they_hold_are_not_trusted() -> None:
    model, x = Consumers(nn.GELU()), torch.randn(4, 5, WIDTH, requires_grad=True)
    wanted = gradients(model, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t / 2):
        found = gradients(model, x)
    assert all(torch.allclose(f, w) for f, w in zip(found, wanted, strict=True))


def test_save_on_cpu() -> None:
    model, x = Consumers(nn.GELU()), torch.randn(4, 5, WIDTH, requires_grad=True)
    wanted = gradients(model, x)
    with torch.autograd.graph.save_on_cpu():
        found = gradients(model, x)
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


def test_a_changed_operand_is_an_error_and_no_silence() -> None:
    model, x = Consumers(nn.GELU()), torch.randn(4, 5, WIDTH, requires_grad=True)
    held = x * 1.0
    y = adapted_linear(F.gelu(held), model.weight[0], lora=(LivePart(model.a[0], model.b[0], 1.0),))
    held.add_(1)
    with pytest.raises(RuntimeError, match="remake_inputs"):
        y.sum().backward()


def test_kept_graphs_and_partial_gradients() -> None:
    model, x = Consumers(nn.LayerNorm(WIDTH)), torch.randn(4, 5, WIDTH, requires_grad=True)
    wanted = gradients(model, x)
    loss = model(x).sum()
    only = torch.autograd.grad(loss, [model.a], retain_graph=True)[0]
    again = torch.autograd.grad(loss, [x, model.a, model.b], retain_graph=True)
    last = torch.autograd.grad(loss, [x, model.a, model.b])
    assert torch.equal(only, wanted[1])
    for found in (again, last):
        assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", sorted(PRODUCERS))
def test_memory_is_reused_only_where_it_is_nobody_elses(name: str) -> None:
    model = Consumers(PRODUCERS[name]())
    x = torch.randn(4, 5, WIDTH, requires_grad=True)
    torch.manual_seed(1)
    made = model.producer(x * 1.0)
    before = made.detach().clone()
    y = adapted_linear(made, model.weight[0], lora=(LivePart(model.a[0], model.b[0], 0.5),)).sum()
    first = torch.autograd.grad(y, [x, model.a, model.b], retain_graph=True)
    assert torch.equal(made, before), "the backward wrote into what the producer returned"
    second = torch.autograd.grad(y, [x, model.a, model.b])
    assert all(torch.equal(f, w) for f, w in zip(first, second, strict=True))


def test_the_last_consumer_gives_its_input_to_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Consumers(nn.GELU()), torch.randn(4, 5, WIDTH, requires_grad=True)
    lent: list[int] = []
    make = producers.Remade._made

    def noted(self: producers.Remade) -> Tensor:
        value = make(self)
        lent.append(value.data_ptr())
        return value

    monkeypatch.setattr(producers.Remade, "_made", noted)
    made = model.producer(x * 1.0)
    received: list[int] = []
    made.register_hook(lambda g: received.append(g.data_ptr()))
    adapted_linear(made, model.weight[0], lora=(LivePart(model.a[0], model.b[0], 0.5),)).sum().backward()
    assert lent == received


def test_nothing_outlives_its_graph() -> None:
    gc.collect()
    gc.disable()  # reference counts alone must free it all
    try:
        model, x = Consumers(nn.LayerNorm(WIDTH)), torch.randn(4, 5, WIDTH, requires_grad=True)
        start = x * 1.0
        watched = weakref.ref(start)
        made = model.producer(start)
        y = adapted_linear(made, model.weight[0], lora=(LivePart(model.a[0], model.b[0], 1.0),))
        y.sum().backward()
        del start, made, y
        assert watched() is None
    finally:
        gc.enable()
