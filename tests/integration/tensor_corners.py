"""What else processes do with models that tensor parallelism splits: dropout, wrappers, refusals."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx import Policy, Rule
from lora_fx.checkpoints import adapter_state, load_adapter_state, materialise, reset_adapter
from lora_fx.errors import WrappedModelError
from lora_fx.passes.sharded import fill, whole
from tests.integration.small import batch, gap, loss, train, with_values
from tests.integration.tensors import (
    EVERY,
    POLICIES,
    ROUNDING,
    Net,
    adapted,
    assert_same_gradients,
    by_heads,
    net,
    relative,
    split,
)


def drops(rank: int, folder: Path) -> None:
    """Dropout: what all processes read is masked as one process masks it; own columns have own masks."""
    mesh, policy = init_device_mesh("cpu", (2,)), Policy(Rule(rank=2, dropout=0.25))
    for style in (ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())):
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(256, 8))
            models.append(lora_fx.inject(model, policy, torch.ones(2, 256), seed=1))
        model, alone = models
        with torch.no_grad():
            for parameter in lora_fx.parameters(alone):
                parameter.fill_(0.5)
        state = adapter_state(alone)
        parallelize_module(model, mesh, {"0": style})
        load_adapter_state(model, state)
        x = torch.ones(64, 256)
        results = []
        for each in (model, alone):
            torch.manual_seed(7)
            each.train()
            each(x).square().sum().backward()
            torch.manual_seed(7)
            results.append(each(x).detach())
        grads = [whole(p.grad) for p in (model[0]._parameters["lora_A__weight__default"],)]
        if isinstance(style, ColwiseParallel):
            assert relative(results[0], results[1]) < ROUNDING[torch.float32]
            assert relative(grads[0], alone[0]._parameters["lora_A__weight__default"].grad) < 1e-5
            continue
        # Of every row of ones, h is how many are kept: not the same of one half and of the other.
        first, second = grads[0][0].chunk(2)
        assert not torch.equal(first, second)
        model.eval()
        with lora_fx.disable_adapter(model):
            plain = model(x).detach()
        share = (results[0] - plain).mean() / (model(x).detach() - plain).mean()
        assert float(share) == pytest.approx(1, abs=0.02)


def switched(rank: int, folder: Path) -> None:
    """Two adapters: switching, and taking one out, as on one process."""
    models, rounding = [net(dtype=torch.float64) for _ in range(2)], ROUNDING[torch.float64]
    for model in models:
        lora_fx.inject(model, POLICIES["every weight"], batch(0), seed=1, adapter="a")
        lora_fx.inject(model, POLICIES["biases"], batch(0), seed=2, adapter="b")
    model, alone = models
    split(model)
    for adapter in ("a", "b", "a"):
        for each in models:
            lora_fx.set_adapter(each, adapter)
            train(each, steps=2)
        assert_same_gradients(model, alone, rounding)
        assert gap(model, alone) < rounding
    for each in models:
        lora_fx.unload(each, "a")
    assert gap(model, alone) < rounding
    train(model, steps=1)
    train(alone, steps=1)
    assert gap(model, alone) < rounding


def seen_by_others(rank: int, folder: Path) -> None:
    """torch.compile in one graph, checkpoints of both kinds, deepcopy, clipping; no second derivative."""
    rounding = ROUNDING[torch.float32]
    model, alone = split(adapted("every weight")), with_values(adapted("every weight"))
    load_adapter_state(model, adapter_state(alone))
    loss(alone, batch(1)).backward()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for reentrant in (None, True, False):
        if reentrant is None:
            loss(compiled, batch(1)).backward()
        else:
            h = model.emb(batch(1))
            for block in model.blocks:
                h = checkpoint(block, h, use_reentrant=reentrant)
            F.cross_entropy(model.head(model.norm(h)).flatten(0, 1), batch(1).flatten()).backward()
        for name, parameter in alone.named_parameters():
            if parameter.grad is not None:
                assert relative(model.get_parameter(name).grad, parameter.grad) < rounding, (reentrant, name)
        size = torch.nn.utils.clip_grad_norm_(lora_fx.parameters(model), 1e9)
        wanted = torch.nn.utils.clip_grad_norm_(lora_fx.parameters(alone), 1e9)
        assert float(whole(size)) == pytest.approx(float(wanted), rel=rounding)
        model.zero_grad()
    assert gap(copy.deepcopy(model), alone) < rounding
    x = torch.ones(2, 16, requires_grad=True)
    (first,) = torch.autograd.grad(
        model.blocks[0].o(x.chunk(2, -1)[rank]).square().sum(), x, create_graph=True
    )
    with pytest.raises(WrappedModelError, match="second derivative"):
        first.square().sum().backward()


def from_meta(rank: int, folder: Path) -> None:
    """Injected and split on the meta device, then given memory and values."""
    with torch.device("meta"):
        model = Net()
    lora_fx.inject(model, POLICIES["biases"], seed=None)
    materialise(split(model), "cpu")
    weights = net().state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                fill(parameter, weights[name])
    reset_adapter(model, seed=1)
    alone = lora_fx.inject(net(), POLICIES["biases"], seed=1)
    assert gap(model, alone) < ROUNDING[torch.float32]
    train(model)
    train(alone)
    assert gap(model, alone) < ROUNDING[torch.float32]


def replicated(rank: int, folder: Path) -> None:
    """Weights that every process has all of, on inputs split by examples, by places, by features, or not."""
    mesh = init_device_mesh("cpu", (2,))
    for layout in (Shard(0), Shard(1), Shard(2), Replicate()):
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 5)).double()
            models.append(with_values(lora_fx.inject(model, Policy(Rule(rank=2), bias="all"), seed=1)))
        model, alone = models
        distribute_module(model, mesh)
        x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(2)).double()
        given = distribute_tensor(x, mesh, [layout]).requires_grad_()
        found, wanted = model(given), alone(x.requires_grad_())
        assert relative(found, wanted.detach()) < ROUNDING[torch.float64]
        found.square().sum().backward()
        wanted.square().sum().backward()
        pairs = [*zip(model.parameters(), alone.parameters(), strict=True), (given, x)]
        for mine, other in pairs:
            assert (mine.grad is None) == (other.grad is None)
            if mine.grad is not None and other.grad is not None:
                assert mine.grad.placements == mine.placements
                assert relative(mine.grad, other.grad) < ROUNDING[torch.float64]


def refused(rank: int, folder: Path) -> None:
    """What is refused, each by name: at parallelize_module, or where it is asked for."""
    mesh = init_device_mesh("cpu", (2,))
    tied = net()
    tied.head.weight = tied.emb.weight
    lora_fx.inject(tied, EVERY, batch(0))
    for style in (ColwiseParallel(), RowwiseParallel()):
        with pytest.raises(WrappedModelError, match="another module holds"):
            parallelize_module(tied, mesh, {"head": style})
    convs = lora_fx.inject(nn.Sequential(nn.Conv2d(3, 4, 3)), Policy(Rule(rank=1)))
    with pytest.raises(WrappedModelError, match="adapters on Conv2d"):
        distribute_module(convs, mesh)
    counted = lora_fx.inject(nn.Sequential(nn.Embedding(8, 4, scale_grad_by_freq=True)), Policy(Rule(rank=1)))
    with pytest.raises(WrappedModelError, match="scale_grad_by_freq"):
        parallelize_module(counted, mesh, {"0": RowwiseParallel(input_layouts=Replicate())})
    plane = init_device_mesh("cpu", (2, 1))
    flat = lora_fx.inject(nn.Sequential(nn.Linear(4, 4)), Policy(Rule(rank=1)))
    with pytest.raises(WrappedModelError, match="mesh of one dimension"):
        distribute_module(flat, plane)
    half = lora_fx.inject(nn.Sequential(nn.Linear(4, 4)), Policy(Rule(rank=1)))
    spread = nn.Parameter(distribute_tensor(half[0]._parameters["weight"].detach(), mesh, [Shard(0)]))
    half[0]._parameters["weight"] = spread
    with pytest.raises(WrappedModelError, match="beside an adapter that is none"):
        half(distribute_tensor(torch.ones(2, 4), mesh, [Replicate()]))
    bare = distribute_module(lora_fx.inject(nn.Sequential(nn.Linear(4, 4)), Policy(Rule(rank=1))), mesh)
    with pytest.raises(WrappedModelError, match="an input or a bias that is none"):
        bare(torch.ones(2, 4))
    model = split(adapted("every weight"))
    with pytest.raises(WrappedModelError, match="DTensor"):
        lora_fx.verify(model, batch(0))
    with pytest.raises(WrappedModelError, match="DTensor"):
        lora_fx.export_onnx(model, folder / "model.onnx", batch(0))
    with pytest.raises(WrappedModelError, match="DTensor"):
        lora_fx.inject(model, EVERY, batch(0), adapter="late")
    with pytest.raises(WrappedModelError, match="Inject first"):
        lora_fx.inject(split(net()), EVERY, batch(0))


def sharded_too(rank: int, folder: Path, policy: str) -> None:
    """Four processes: split in pairs, then sharded by FSDP2 across the pairs; batches are halved."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    place = mesh.get_local_rank("dp")

    def spread() -> Net:
        model = adapted(policy)
        parallelize_module(model, mesh["tp"], by_heads())
        for block in model.blocks:
            fully_shard(block, mesh=mesh["dp"])
        return fully_shard(model, mesh=mesh["dp"])

    model, alone = spread(), adapted(policy)
    train(model, rank=place, of=2)
    train(alone)
    assert gap(model, alone) < ROUNDING[torch.float32]
    before = model(batch(9)).detach()
    lora_fx.save_adapter(model, folder / "a.safetensors")
    dist.barrier()
    one = lora_fx.load_adapter(net(), folder / "a.safetensors")
    assert gap(one, model) < ROUNDING[torch.float32]
    other = spread()
    lora_fx.load_adapter(other, folder / "a.safetensors", replace=True)
    assert torch.equal(other(batch(9)), before)
    with lora_fx.folded(model):
        assert gap(model, one) < ROUNDING[torch.float32]
    assert torch.equal(model(batch(9)), before)
    lora_fx.unload(other)
    assert gap(other, net()) < ROUNDING[torch.float32]
    lora_fx.fold(model)
    assert gap(model, one) < ROUNDING[torch.float32]


def transformers_plan(rank: int, folder: Path) -> None:
    """A Llama split after inject by its own plan in torch's styles; split at loading, it is refused."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    first = LlamaForCausalLM(config).eval()
    first.save_pretrained(folder / "llama")
    dist.barrier()
    model, alone = (LlamaForCausalLM.from_pretrained(folder / "llama").eval() for _ in range(2))
    ids = torch.arange(12).view(2, 6)
    for each in (model, alone):
        lora_fx.inject(each, Policy(Rule(rank=2)), {"input_ids": ids}, seed=1)
    styles: dict[str, ParallelStyle] = {"colwise": ColwiseParallel(), "rowwise": RowwiseParallel()}
    plan = {f"model.{name}": styles[style] for name, style in config.base_model_tp_plan.items()}
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    assert isinstance(model.model.layers[1].mlp.down_proj._parameters["lora_A__weight__default"], DTensor)
    state = adapter_state(with_values(alone))
    load_adapter_state(model, state)
    for each in (model, alone):
        each(input_ids=ids, labels=ids).loss.backward()
    assert relative(model(ids).logits, alone(ids).logits.detach()) < ROUNDING[torch.float32]
    wanted = dict(alone.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (wanted[name].grad is None), name
        if parameter.grad is not None and wanted[name].grad is not None:
            assert relative(parameter.grad, wanted[name].grad) < ROUNDING[torch.float32], name
    assert torch.equal(model.generate(ids, max_new_tokens=3), alone.generate(ids, max_new_tokens=3))
    loaded = LlamaForCausalLM.from_pretrained(folder / "llama", tp_plan="auto")
    assert relative(loaded(ids).logits, first(ids).logits.detach()) < ROUNDING[torch.float32]
    with pytest.raises(WrappedModelError, match="without tp_plan"):
        lora_fx.inject(loaded, Policy(Rule(rank=2)), {"input_ids": ids})
