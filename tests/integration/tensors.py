"""What two processes do with models that tensor parallelism splits after inject."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

import lora_fx
from lora_fx import Policy, Rule, Train
from lora_fx.checkpoints import adapter_state, load_adapter_state, reset_adapter
from lora_fx.kinds import fused_linear, linear
from lora_fx.passes.sharded import whole
from tests.integration.small import WORDS, batch, gap, loss, train, with_values

ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-10}

Plan = dict[str, ParallelStyle]


class Block(nn.Module):
    """Attention with q, k and v apart, or (``fused``) in one weight, and a feed-forward."""

    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.fused, self.size = fused, width // 4
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.o = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        parts = self.qkv(y).chunk(3, -1) if self.fused else (self.q(y), self.k(y), self.v(y))
        q, k, v = (t.unflatten(-1, (-1, self.size)).transpose(1, 2) for t in parts)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Net(nn.Module):
    def __init__(self, fused: bool = False, width: int = 16) -> None:
        super().__init__()
        self.emb = nn.Embedding(WORDS + 1, width, padding_idx=3)
        self.blocks = nn.ModuleList(Block(width, fused) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, WORDS + 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


EVERY = Policy(Rule(rank=3))
POLICIES = {
    "every weight": EVERY,
    "rows": Policy(Rule(role="qv", rank=2), Rule(role=("up", "down"), rank=3)),
    "starts": Policy(
        Rule(role="qkvo", rank=2, init="pissa"), Rule(role=("up", "down"), rank=2, init="olora")
    ),
    "magnitudes": Policy(
        Train(module="head"),
        Train(name="blocks.0.up.weight"),
        Rule(kind="linear", rank=2, dora=True),
        bias="all",
    ),
    "biases": Policy(Rule(kind="linear", rank=2), bias="lora_only"),
    "asked for": Policy(
        Rule(role="qkvo", rank=2, compute="weight"), Rule(kind="linear", rank=2, compute="branch")
    ),
}


def net(fused: bool = False, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net(fused).to(dtype)


def adapted(policy: str, fused: bool = False, dtype: torch.dtype = torch.float32) -> Net:
    model = net(fused, dtype)
    lora_fx.inject(model, POLICIES[policy], batch(0), seed=1)
    return model


def by_heads(fused: bool = False) -> Plan:
    """Attention and feed-forward as pairs, the embedding by words, the head by words."""
    plan: Plan = {"emb": RowwiseParallel(input_layouts=Replicate())}
    for name in ("blocks.0", "blocks.1"):
        first = ("up",) if fused else ("q", "k", "v", "up")
        plan |= {f"{name}.{key}": ColwiseParallel() for key in first}
        plan |= {f"{name}.{key}": RowwiseParallel() for key in (("down",) if fused else ("o", "down"))}
        if fused:
            plan[f"{name}.qkv"] = ColwiseParallel(output_layouts=Replicate())
            plan[f"{name}.o"] = RowwiseParallel(input_layouts=Replicate())
    plan["head"] = ColwiseParallel(output_layouts=Replicate())
    return plan


def by_sequence() -> Plan:
    """Between attention and feed-forward every process has some of the places of the sequence."""
    plan: Plan = {
        "emb": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    for name in ("blocks.0", "blocks.1"):
        plan[name] = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Shard(1))
        plan |= {f"{name}.{key}": SequenceParallel() for key in ("norm", "norm2")}
        plan |= {f"{name}.{key}": ColwiseParallel(input_layouts=Shard(1)) for key in ("q", "k", "v", "up")}
        scattered = RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
        plan |= {f"{name}.{key}": scattered for key in ("o", "down")}
    return plan


def by_features(fused: bool = False) -> Plan:
    """The embedding by its dimensions; every linear gathers what it computes, one takes a DTensor."""
    plan: Plan = {"emb": ColwiseParallel(output_layouts=Replicate())}
    del fused
    for name in ("blocks.0", "blocks.1"):
        plan[f"{name}.up"] = ColwiseParallel(use_local_output=False)
        plan[f"{name}.down"] = RowwiseParallel()
        plan[f"{name}.o"] = ColwiseParallel(output_layouts=Replicate())
    return plan


PLANS = {"heads": by_heads, "sequence": lambda fused: by_sequence(), "features": by_features}


def split(model: Net, plan: str = "heads", *, fused: bool = False) -> Net:
    parallelize_module(model, init_device_mesh("cpu", (2,)), PLANS[plan](fused))
    return model


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return a difference over its size; of what is exactly zero, the difference."""
    difference, size = (whole(found.detach()) - wanted).norm(), wanted.norm()
    return float(difference / size if size else difference)


def assert_same_gradients(model: nn.Module, alone: nn.Module, rounding: float) -> None:
    """Adapters alone have gradients, laid out as they are; gathered, they are the one process's."""
    for each in (model, alone):
        each.zero_grad()
        loss(each, batch(1)).backward()
    found, wanted = dict(model.named_parameters()), dict(alone.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in wanted.items():
        mine = found[name]
        assert mine.requires_grad == parameter.requires_grad, name
        assert (mine.grad is None) == (parameter.grad is None), name
        if mine.grad is None or parameter.grad is None:
            continue
        if isinstance(mine, DTensor):
            assert isinstance(mine.grad, DTensor)
            assert mine.grad.placements == mine.placements, name
        if ".k.lora_full__bias" in name:  # attention is blind to it: what there is, is rounding
            assert float(whole(mine.grad).norm()) < rounding * float(
                wanted[name.replace(".k.", ".q.")].grad.norm()
            )
            continue
        assert relative(mine.grad, parameter.grad) < rounding, name
    for each in (model, alone):
        each.zero_grad()


class Case(NamedTuple):
    """What is adapted, how the model is split, and in which precision."""

    policy: str
    plan: str = "heads"
    fused: bool = False
    dtype: torch.dtype = torch.float64

    def whole(self) -> Net:
        return adapted(self.policy, self.fused, self.dtype)

    def split(self) -> Net:
        return split(self.whole(), self.plan, fused=self.fused)

    def base(self) -> Net:
        return net(self.fused, self.dtype)

    def split_base(self) -> Net:
        return split(self.base(), self.plan, fused=self.fused)

    @property
    def rounding(self) -> float:
        return ROUNDING[self.dtype]


WHOLE = (Replicate(), Replicate())


def lies_beside(module: nn.Module, layouts: tuple[Any, ...]) -> None:
    """A and B, of whatever adapter, lie on the mesh as they should."""
    for name, parameter in module.named_parameters():
        for key, layout in zip(("lora_A", "lora_B"), layouts, strict=False):
            if name.startswith(f"{key}__"):
                assert isinstance(parameter, DTensor)
                assert parameter.placements == (layout,), name


def computes_as_one(rank: int, folder: Path, *options: Any) -> None:
    """Forward, gradients, training, files both ways, folding and unloading."""
    case = Case(*options)
    model, alone, plain = case.split(), case.whole(), case.split_base()
    lora_fx.parameters(model)
    # A trained copy, or DoRA's start, is gathered and split again: torch multiplies it in another order.
    assert gap(model, plain) <= (case.rounding if case.policy == "magnitudes" else 0.0)
    if case.plan == "heads" and not case.fused:
        lies_beside(model.blocks[0].up, (Replicate(), Shard(0)) if case.policy != "magnitudes" else ())
        lies_beside(model.blocks[0].down, (Shard(1), Replicate()) if case.policy != "magnitudes" else WHOLE)
    if case.policy != "starts":
        load_adapter_state(model, adapter_state(with_values(alone)))
        assert gap(alone, case.base()) > 1e-3
    assert gap(model, alone) < case.rounding
    assert_same_gradients(model, alone, case.rounding)
    with lora_fx.disable_adapter(model):
        assert torch.equal(model(batch(9)), plain(batch(9)))
    train(model)
    train(alone)
    assert gap(model, alone) < case.rounding
    one = comes_back(rank, folder, case, model)
    before = model(batch(9)).detach()
    with lora_fx.folded(model):
        assert gap(model, one) < case.rounding
    assert torch.equal(model(batch(9)), before)
    lora_fx.fold(model)
    lora_fx.fold(one)
    assert gap(model, one) < case.rounding
    assert type(model.blocks[0].up) is nn.Linear
    for key, tensor in one.state_dict().items():
        assert relative(model.state_dict()[key], tensor) < case.rounding, key


def adds_thin_products(rank: int, folder: Path, *options: Any) -> None:
    """The same by the fused operation, which shapes as small as these would not take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "merged_linear", lambda *_: None)
        calls: list[int] = []
        forward = fused_linear._forward
        patch.setattr(fused_linear, "_forward", lambda *args: calls.append(1) or forward(*args))
        computes_as_one(rank, folder, *options)
        assert calls


def comes_back(rank: int, folder: Path, case: Case, model: Net) -> Net:
    """Save what is split, and load it: whole, and split; then take it out. Return the whole one."""
    before = model(batch(9)).detach()
    lora_fx.save_adapter(model, folder / "split.safetensors")
    one = lora_fx.load_adapter(case.base(), folder / "split.safetensors")
    assert gap(one, model) < case.rounding
    dcp.save({"adapter": adapter_state(model)}, checkpoint_id=folder / "dcp")
    if rank == 0:
        lora_fx.save_adapter(one, folder / "one.safetensors")
    dist.barrier()
    other, plain = case.split(), case.split_base()
    lora_fx.load_adapter(other, folder / "one.safetensors", replace=True)
    assert torch.equal(other(batch(9)), before)
    reset_adapter(other, seed=1)
    assert gap(other, case.whole()) < case.rounding
    dcp.load({"adapter": adapter_state(other)}, checkpoint_id=folder / "dcp")
    assert torch.equal(other(batch(9)), before)
    assert lora_fx.unload(other) is other
    assert torch.equal(other(batch(9)), plain(batch(9)))
    assert_same(other, plain)
    return one


def assert_same(model: nn.Module, other: nn.Module) -> None:
    """Two models are alike: classes, names, flags, layouts and bits."""
    assert [type(m) for m in model.modules()] == [type(m) for m in other.modules()]
    found, wanted = dict(model.named_parameters()), dict(other.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in wanted.items():
        assert found[name].requires_grad == parameter.requires_grad, name
        assert getattr(found[name], "placements", None) == getattr(parameter, "placements", None), name
        assert torch.equal(whole(found[name]), whole(parameter)), name
