"""What two processes do with models that are not plain: fused weights, several adapters, wrappers inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx import Policy, Rule, Train
from lora_fx.checkpoints import adapter_state, materialise, reset_adapter
from lora_fx.errors import WrappedModelError
from tests.integration.small import (
    WORDS,
    Convs,
    Net,
    adapted,
    base,
    batch,
    convs,
    gap,
    image,
    loss,
    rules,
    train,
)
from tests.integration.work import ROUNDING, sharded


class Attention(nn.Module):
    """A fused q, k, v and widths that two processes cannot halve."""

    def __init__(self, width: int = 18, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.emb = nn.Embedding(WORDS, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width + 1), nn.Linear(2 * width + 1, width)
        self.head = nn.Linear(width, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(h + self.down(F.gelu(self.up(h))))


POLICIES = {
    "rows, heads, biases": Policy(
        Train(module="head"),
        Rule(role="qv", rank=2),
        Rule(role=("up", "down"), rank=3, dora=True),
        Rule(kind="embedding", rank=2),
        bias="all",
    ),
    "rows with a start": Policy(
        Train(module="head"),
        Rule(role="qv", rank=2, init="pissa"),
        Rule(role=("up", "down"), rank=3, init="olora"),
        bias="lora_only",
    ),
}


def attention(dtype: torch.dtype = torch.float32) -> Attention:
    torch.manual_seed(0)
    return Attention().to(dtype)


def adapted_attention(policy: str, seed: int = 1, dtype: torch.dtype = torch.float32) -> nn.Module:
    return lora_fx.inject(attention(dtype), POLICIES[policy], batch(0), seed=seed)


def by_layers(model: nn.Module) -> None:
    for layer in (model.qkv, model.out, model.up, model.down, model.head):
        fully_shard(layer)
    fully_shard(model)


def unsharded_afterwards(model: nn.Module) -> None:
    fully_shard(model, reshard_after_forward=False)


def replicated_and_sharded(model: nn.Module) -> None:
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))


def fused(rank: int, folder: Path, policy: str, shard: Callable[[nn.Module], None]) -> None:
    """Train, save, fold, and come back: from a file of shards, of one machine, and of dcp."""
    model, alone = adapted_attention(policy), adapted_attention(policy)
    shard(model)
    train(model, rank=rank, of=2)
    train(alone)
    assert gap(model, alone) < ROUNDING
    lora_fx.save_adapter(model, folder / "sharded.safetensors")
    assert gap(lora_fx.load_adapter(attention(), folder / "sharded.safetensors"), alone) < ROUNDING
    before = model(batch(9)).detach()
    with lora_fx.folded(model):
        assert gap(model, alone) < ROUNDING
    assert torch.equal(model(batch(9)), before)
    dcp.save({"adapter": adapter_state(model)}, checkpoint_id=folder / "dcp")
    whole = adapted_attention(policy, seed=5)
    dcp.load({"adapter": adapter_state(whole)}, checkpoint_id=folder / "dcp")
    assert gap(whole, alone) < ROUNDING
    if rank == 0:
        lora_fx.save_adapter(alone, folder / "alone.safetensors")
    torch.distributed.barrier()
    other = adapted_attention(policy, seed=5)
    shard(other)
    assert gap(other, alone) > 1e-2
    lora_fx.load_adapter(other, folder / "alone.safetensors", replace=True)
    assert gap(other, alone) < ROUNDING
    train(other, rank=rank, of=2, steps=1, first=3)
    train(alone, steps=1, first=3)
    assert gap(other, alone) < ROUNDING


def fused_from_meta(rank: int, folder: Path, policy: str) -> None:
    with torch.device("meta"):
        model = Attention()
        lora_fx.inject(model, POLICIES[policy], torch.zeros(2, 5, dtype=torch.long))  # all of it on meta
    by_layers(model)
    materialise(model, "cpu")
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, attention().state_dict(), options=options)
    reset_adapter(model, seed=1)
    alone = adapted_attention(policy)
    assert gap(model, alone) < ROUNDING
    train(model, rank=rank, of=2)
    train(alone)
    assert gap(model, alone) < ROUNDING


def bfloat16_base(rank: int, folder: Path) -> None:
    """Adapters in float32 beside a base in bfloat16, in one group."""
    policy = "rows, heads, biases"
    model, alone = (adapted_attention(policy, dtype=torch.bfloat16) for _ in range(2))
    fully_shard(model)
    train(model, rank=rank, of=2)
    train(alone)
    assert {p.dtype for p in lora_fx.parameters(model)} == {torch.float32}
    assert gap(model, alone) < 1e-2
    assert gap(alone, attention(torch.bfloat16)) > 2e-2


def _with_two(policy: str, other: str) -> nn.Module:
    model = adapted_attention(policy)
    return lora_fx.inject(model, POLICIES[other], batch(0), adapter="second", seed=3)


def switching_sharded(rank: int, folder: Path) -> None:
    """What a switch makes trainable is trained, though the root's parameters were gathered then."""
    model, alone = _with_two(*POLICIES), _with_two(*POLICIES)
    fully_shard(model.qkv)
    fully_shard(model)
    for adapter in ("default", "second", "default"):
        for each in (model, alone):
            lora_fx.set_adapter(each, adapter)
        before = alone(batch(9)).detach()
        train(model, rank=rank, of=2)
        train(alone)
        assert gap(model, alone) < ROUNDING
        assert float((alone(batch(9)) - before).norm() / before.norm()) > 1e-2
    lora_fx.save_adapter(model, folder / "second.safetensors", "second")
    lora_fx.set_adapter(alone, "second")
    assert gap(lora_fx.load_adapter(attention(), folder / "second.safetensors"), alone) < ROUNDING


def switching_replicated(rank: int, folder: Path) -> None:
    """DDP synchronises what was trained when it was made: another adapter wants another wrapper."""
    model, alone = _with_two(*POLICIES), _with_two(*POLICIES)
    for adapter in ("default", "second", "default"):
        for each in (model, alone):
            lora_fx.set_adapter(each, adapter)
        wrapped = DistributedDataParallel(model, find_unused_parameters=False)
        train(wrapped, model, rank=rank, of=2)
        train(alone)
        assert gap(model, alone) < ROUNDING
    # A reference without adapters between steps, as preference training runs it.
    with torch.no_grad(), lora_fx.disable_adapter(model):
        wrapped(batch(0))
    train(wrapped, model, rank=rank, of=2, steps=1)
    lora_fx.set_adapter(model, "second")
    with torch.no_grad():
        wrapped(batch(0))
    with pytest.raises(WrappedModelError, match="new DistributedDataParallel"):
        loss(wrapped, batch(0))
    late = attention()
    wrapped = DistributedDataParallel(late)
    lora_fx.inject(wrapped.module, POLICIES["rows, heads, biases"], batch(0), seed=1)
    with pytest.raises(WrappedModelError, match="does not synchronise"):
        loss(wrapped, batch(0))
    lora_fx.unload(late)
    loss(wrapped, batch(0))


def wrapped_blocks(rank: int, folder: Path) -> None:
    """Activation checkpointing puts a segment into every name: files must not show it."""

    def is_block(module: nn.Module) -> bool:
        return type(module).__qualname__ == "Block"

    model, alone = adapted(tied=True), adapted(tied=True)
    apply_activation_checkpointing(model, check_fn=is_block)
    sharded(model)
    train(model, rank=rank, of=2)
    train(alone)
    assert gap(model, alone) < ROUNDING
    assert adapter_state(model).keys() == adapter_state(alone).keys()
    lora_fx.save_adapter(model, folder / "a.safetensors")
    assert gap(lora_fx.load_adapter(base(tied=True), folder / "a.safetensors"), alone) < ROUNDING
    with lora_fx.folded(model):
        assert gap(model, alone) < ROUNDING
    lora_fx.load_adapter(model, folder / "a.safetensors", replace=True)
    reset_adapter(model, seed=1)
    assert gap(model, adapted(tied=True)) < ROUNDING
    plain = base()
    apply_activation_checkpointing(plain, check_fn=is_block)
    with pytest.raises(WrappedModelError, match="Inject first"):
        lora_fx.inject(plain, rules(), batch(0))


def optimisers(rank: int, folder: Path) -> None:
    """Adapters and optimiser by dcp: bit for bit on as many processes, within rounding on one machine."""

    def build(model: Net) -> tuple[Net, torch.optim.Optimizer]:
        return model, torch.optim.AdamW(lora_fx.parameters(model), lr=1e-2)

    def steps(model: Net, optimizer: torch.optim.Optimizer, first: int, shares: int, share: int) -> None:
        for step in range(first, first + 2):
            loss(model, batch(step).chunk(shares)[share]).backward()
            nn.utils.clip_grad_norm_(lora_fx.parameters(model), 0.05)
            optimizer.step()
            optimizer.zero_grad()

    def state(model: Net, optimizer: torch.optim.Optimizer) -> dict[str, object]:
        return {"adapter": adapter_state(model), "optimizer": get_optimizer_state_dict(model, optimizer)}

    model, optimizer = build(sharded(adapted(tied=True)))
    steps(model, optimizer, 0, 2, rank)
    dcp.save(state(model, optimizer), checkpoint_id=folder / "dcp")
    steps(model, optimizer, 2, 2, rank)
    for other, shares in ((sharded(adapted(tied=True)), 2), (adapted(tied=True), 1)):
        resumed, theirs = build(other)
        held = state(resumed, theirs)
        dcp.load(held, checkpoint_id=folder / "dcp")
        set_optimizer_state_dict(resumed, theirs, held["optimizer"])
        steps(resumed, theirs, 2, shares, rank if shares == 2 else 0)
        assert gap(resumed, model) < ROUNDING
        assert shares == 1 or torch.equal(resumed(batch(9)), model(batch(9)))
    alone, theirs = build(adapted(tied=True))
    steps(alone, theirs, 0, 1, 0)
    steps(alone, theirs, 2, 1, 0)
    assert gap(model, alone) < ROUNDING


def accumulated(rank: int, folder: Path) -> None:
    """Gradients accumulated without synchronisation, under FSDP2."""
    model, alone = sharded(adapted()), adapted()
    optimizer = torch.optim.AdamW(lora_fx.parameters(model), lr=1e-2)
    for step in range(3):
        first, second = batch(step).chunk(2)[rank].chunk(2)
        model.set_requires_gradient_sync(False)
        (loss(model, first) / 2).backward()
        model.set_requires_gradient_sync(True)
        (loss(model, second) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    train(alone)
    assert gap(model, alone) < ROUNDING


class Checkpointed(nn.Module):
    def __init__(self, inner: Net, *, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner.emb(x)
        for block in self.inner.blocks:
            h = checkpoint(block, h, use_reentrant=self.reentrant)
        return self.inner.head(h)


def checkpointed(rank: int, folder: Path) -> None:
    alone = adapted()
    train(alone)
    for reentrant in (True, False):
        for options in ({}, {"static_graph": True, "gradient_as_bucket_view": True}):
            model = adapted()
            wrapped = DistributedDataParallel(Checkpointed(model, reentrant=reentrant), **options)
            train(wrapped, model, rank=rank, of=2)
            assert gap(model, alone) < ROUNDING


def compiled(rank: int, folder: Path) -> None:
    alone = adapted()
    train(alone)
    model = adapted()
    wrapped = torch.compile(DistributedDataParallel(model), backend="eager")
    train(wrapped, model, rank=rank, of=2)
    assert gap(model, alone) < ROUNDING
    model = sharded(adapted())
    for block in model.blocks:
        block.compile(backend="eager")
    train(model, rank=rank, of=2)
    assert gap(model, alone) < ROUNDING


def optimiser_shards_and_averages(rank: int, folder: Path) -> None:
    """ZeRO's optimiser, and a moving average that is saved and loaded."""
    model, alone = adapted(tied=True), adapted(tied=True)
    wrapped = DistributedDataParallel(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = ZeroRedundancyOptimizer(lora_fx.parameters(model), torch.optim.AdamW, lr=1e-2)
    for step in range(3):
        loss(wrapped, batch(step).chunk(2)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    train(alone)
    assert gap(model, alone) < ROUNDING
    assert gap(average.module, model) > 1e-4
    path = folder / f"average{rank}.safetensors"
    lora_fx.save_adapter(average.module, path)
    assert gap(lora_fx.load_adapter(base(tied=True), path), average.module) < ROUNDING


def statistics(rank: int, folder: Path, norm_stats: str) -> None:
    """Batch normalisation: frozen, or moved in the adapter's copy, which DDP keeps equal everywhere."""
    policy = Policy(Rule(rank=2), norm_stats=norm_stats, bias="all")
    alone = convs(policy)
    _steps(alone, alone, 1, 0)
    for wrap in (DistributedDataParallel, fully_shard):
        model = convs(policy)
        wrapped = wrap(model)
        _steps(wrapped, model, 2, rank)
        lora_fx.save_adapter(model, folder / f"{rank}.safetensors")
        torch.distributed.barrier()
        writer = 0 if wrap is fully_shard else rank
        loaded = lora_fx.load_adapter(Convs.seeded(), folder / f"{writer}.safetensors").eval()
        with torch.no_grad():
            wanted = loaded(image(9))
            if norm_stats == "freeze":
                assert _apart(wanted, alone.eval()(image(9))) < ROUNDING
            found = model.eval()(image(9))
            assert rank != writer or _apart(found, wanted) < ROUNDING
        held = dict(Convs.seeded().named_buffers())
        assert all(torch.equal(b, held[n]) for n, b in model.named_buffers() if n in held)


def _steps(model: nn.Module, inner: nn.Module, shares: int, share: int) -> None:
    optimizer = torch.optim.AdamW(lora_fx.parameters(inner), lr=1e-2)
    for step in range(3):
        model(image(10 + step).chunk(shares)[share]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def received(rank: int, folder: Path, model: Net, wanted: Tensor) -> None:
    """An injected model that came to this process as a spawned worker's does: pickled."""
    assert torch.equal(model(batch(0)), wanted)
    assert model.head._parameters["weight"] is model.emb._parameters["weight"]
    assert lora_fx.parameters(model)
    train(model)
    assert not torch.equal(model(batch(0)), wanted)


def exported(rank: int, folder: Path) -> None:
    with pytest.raises(WrappedModelError, match="FSDPModule"):
        lora_fx.export_onnx(sharded(adapted()), folder / "never.onnx", batch(0))
