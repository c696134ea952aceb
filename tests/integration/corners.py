"""What two processes do with what else is put around a model: wrappers, optimisers, averages, statistics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx import Policy, Rule
from lora_fx.checkpoints import adapter_state, reset_adapter
from lora_fx.errors import WrappedModelError
from lora_fx.kinds.spread import is_sharded
from lora_fx.passes.sharded import whole
from tests.integration.small import (
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
    """An injected model that came to this process as a spawned worker's does: pickled, its memory shared."""
    assert torch.equal(model(batch(0)), wanted)
    torch.distributed.barrier()  # what one process trains, the other sees
    assert model.head._parameters["weight"] is model.emb._parameters["weight"]
    assert lora_fx.parameters(model)
    train(model)
    assert not torch.equal(model(batch(0)), wanted)


def inside_a_shard(rank: int, folder: Path) -> None:
    """The injected model is a part of what was given to ``fully_shard``, as in a module of tasks."""
    model, alone = adapted(), adapted()
    outer = nn.Sequential(model)
    fully_shard(outer, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    train(outer, model, rank=rank, of=2)
    train(alone)
    with torch.no_grad():
        outer(batch(0))
    # The root's gathered copies are in bfloat16 now: what is saved must not be.
    lora_fx.save_adapter(model, folder / "a.safetensors")
    state = adapter_state(model)
    assert all(is_sharded(t) and t.dtype is torch.float32 for t in state.values())
    loaded = lora_fx.load_adapter(base(), folder / "a.safetensors")
    pairs = zip(adapter_state(loaded).values(), state.values(), strict=True)
    assert all(torch.equal(t, whole(s)) for t, s in pairs)
    assert gap(loaded, alone) < 3e-2
    with torch.no_grad():
        outer(batch(0))
    lora_fx.fold(model)
    wanted = lora_fx.fold(loaded).state_dict()
    found = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    assert found.keys() == wanted.keys()
    # One is computed from a gathered copy: the same product, of the same numbers.
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-5, atol=1e-7) for name in wanted)
    with torch.no_grad():
        assert torch.allclose(outer(batch(0)).float(), loaded(batch(0)), atol=5e-2)


def exported(rank: int, folder: Path) -> None:
    with pytest.raises(WrappedModelError, match="FSDPModule"):
        lora_fx.export_onnx(sharded(adapted()), folder / "never.onnx", batch(0))
