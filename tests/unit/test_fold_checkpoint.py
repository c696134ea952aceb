"""Folding into safetensors on disk: the bits that fold gives, one tensor at a time, all or nothing."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import lora_fx
from lora_fx import Policy, Rule, Skip, Train, files
from lora_fx.adapter_file import AdapterFile
from lora_fx.passes import fold_checkpoint as fold_module
from lora_fx.passes import new_values
from tests.by_hand import adapt, randomise
from tests.told_progress import told_progress

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    """A state dict as save_file takes it: what is tied is there under every name."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}


def written(model: nn.Module, base: dict[str, Tensor], folder: Path) -> tuple[Path, Path]:
    """The base and the model's adapter as files."""
    save_file(base, folder / "base.safetensors", {"format": "pt", "made": "by a test"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        lora_fx.save_adapter(model, folder / "task.safetensors")
    return folder / "base.safetensors", folder / "task.safetensors"


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def check(model: nn.Module, base: dict[str, Tensor], folder: Path, **options: Any) -> lora_fx.Audit:
    """Fold the checkpoint and the model: the same bits, under the same header."""
    source, adapter = written(model, base, folder)
    audit = lora_fx.fold_checkpoint(source, adapter, folder / "out.safetensors", **options)
    lora_fx.fold(model)
    assert_same(load_file(folder / "out.safetensors"), state(model))
    changed = [name for name, tensor in base.items() if not torch.equal(tensor, state(model)[name])]
    assert changed
    headers = []
    for path in (source, folder / "out.safetensors"):
        content = path.read_bytes()
        headers.append(content[: 8 + int.from_bytes(content[:8], "little")])
    assert headers[0] == headers[1]
    return audit


class Mixed(nn.Module):
    """Every layout of a weight, each owned by a stock module or used bare."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(6, 5), nn.Conv2d(4, 6, 3, groups=2)
        self.up, self.emb = nn.ConvTranspose1d(4, 6, 3, groups=2), nn.Embedding(7, 4)
        self.lstm, self.pair = nn.LSTM(4, 5, bidirectional=True), nn.Bilinear(3, 4, 5)
        self.mha = nn.MultiheadAttention(8, 2)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_kind_has_the_bits_of_fold(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = seeded(Mixed).to(dtype)
    base = state(model)
    plan = adapt(model, **VARIANTS[variant])
    assert len(plan.adapted) == 11
    audit = check(model, base, tmp_path)
    assert all(row.delta for row in audit.rows)


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "olora"])
def test_starts_of_rank_one_have_the_bits_of_fold(init: str, tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(*(nn.Linear(*((6, 1), (1, 6))[i % 2]) for i in range(20))))
    base = state(model)
    lora_fx.inject(model, Policy(Rule(rank=1, alpha=13, init=init)), X, seed=0)  # type: ignore[arg-type]
    randomise(model)
    check(model, base, tmp_path)


class Fused(nn.Module):
    """A fused in-projection of which parts are adapted, experts, and transformers' Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.qkv, self.down = nn.Linear(6, 18), Conv1D(6, 6)
        self.experts = nn.Parameter(torch.randn(3, 6, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(0).chunk(3, -1)
        x = self.down(F.scaled_dot_product_attention(q, k, v)).squeeze(0)
        return torch.bmm(x.expand(3, -1, -1), self.experts).sum(0)


def test_rows_experts_and_conv1d(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = seeded(Fused)
    base = state(model)
    rules = (Rule(role="q", rank=2), Rule(role="v", rank=3), Skip(role="k"), Rule(rank=2))
    lora_fx.inject(model, Policy(*rules), X, seed=0)
    randomise(model)
    check(model, base, tmp_path)
    assert torch.equal(model.qkv.weight[6:12], base["qkv.weight"][6:12])


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x)))


def test_trained_parameters_biases_and_buffers_are_put_in(tmp_path: Path) -> None:
    model = seeded(Normed)
    base = state(model)
    policy = Policy(Train(module="head"), Rule(rank=2), bias="lora_only", norm_stats="train")
    lora_fx.inject(model, policy, X, seed=0)
    randomise(model)
    model.train()(X)
    model.eval()
    check(model, base, tmp_path)
    folded = load_file(tmp_path / "out.safetensors")
    moved = {name for name in base if not torch.equal(folded[name], base[name])}
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert moved == {"head.weight", "head.bias", "first.weight", "first.bias", *statistics}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.emb(ids))


@pytest.mark.parametrize("names", [("emb.weight", "head.weight"), ("emb.weight",), ("head.weight",)])
def test_a_tied_weight_under_each_of_its_names(names: tuple[str, ...], tmp_path: Path) -> None:
    model = seeded(Tied)
    base = {name: tensor for name, tensor in state(model).items() if name in names}
    lora_fx.inject(model, Policy(Rule(rank=2)), torch.arange(4), seed=0)
    randomise(model)
    source, adapter = written(model, base, tmp_path)
    lora_fx.fold_checkpoint(source, adapter, tmp_path / "out.safetensors")
    lora_fx.fold(model)
    wanted = {name: tensor for name, tensor in state(model).items() if name in names}
    assert_same(load_file(tmp_path / "out.safetensors"), wanted)


class Twice(nn.Module):
    """One block under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.again = nn.ModuleList([self.first])

    def forward(self, x: Tensor) -> Tensor:
        return self.again[0](self.first(x))


def test_a_module_under_two_names_is_changed_under_both(tmp_path: Path) -> None:
    model = seeded(Twice)
    base = state(model)
    policy = Policy(Rule(kind="linear", rank=2), bias="all", norm_stats="train")
    lora_fx.inject(model, policy, X, seed=0)
    randomise(model)
    model.train()(X)
    model.eval()
    check(model, base, tmp_path)
    folded = load_file(tmp_path / "out.safetensors")
    for name in ("0.weight", "0.bias", "1.running_mean", "1.num_batches_tracked"):
        assert torch.equal(folded[f"again.0.{name}"], folded[f"first.{name}"])
        assert not torch.equal(folded[f"first.{name}"], base[f"first.{name}"])


def trained(size: float = 0.1, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor]]:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))).to(dtype)
    base = state(model)
    lora_fx.inject(model, Policy(Rule(rank=2)), X.to(dtype), seed=0)
    randomise(model, size=size)
    return model, base


def test_a_half_precision_that_rounds_the_delta_away_warns_or_refuses(tmp_path: Path) -> None:
    model, base = trained(size=0.01, dtype=torch.bfloat16)
    source, adapter = written(model, base, tmp_path)
    out = tmp_path / "out.safetensors"
    with pytest.warns(UserWarning, match="folding keeps .* of the delta of") as asked:
        lora_fx.fold_checkpoint(source, adapter, out, min_retained=0)
    with pytest.warns(UserWarning, match="folding keeps") as told:
        lora_fx.fold(copy.deepcopy(model), min_retained=0)
    assert str(asked[0].message) == str(told[0].message)
    assert asked[0].filename == __file__
    out.unlink()
    with pytest.raises(lora_fx.AdapterValueError, match="at least 99%"):
        lora_fx.fold_checkpoint(source, adapter, out, min_retained=0.99)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "task.safetensors"]


def test_trained_in_bfloat16_and_folded_into_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    base = state(wide)
    model = copy.deepcopy(wide).bfloat16()
    lora_fx.inject(model, Policy(Rule(rank=2)), X.bfloat16(), seed=0)
    randomise(model)
    source, adapter = written(model, base, tmp_path)
    out = tmp_path / "out.safetensors"
    with pytest.raises(lora_fx.BaseMismatchError, match="dtype float32, not bfloat16"):
        lora_fx.fold_checkpoint(source, adapter, out)
    lora_fx.fold_checkpoint(source, adapter, out, base_check="values")
    lora_fx.fold(lora_fx.load_adapter(wide, adapter, base_check="values"))
    assert_same(load_file(out), state(wide))


@pytest.mark.parametrize("entries", [1, 7, 40])
@pytest.mark.parametrize("dora", [False, True])
def test_large_weights_are_changed_in_parts(
    entries: int, dora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seeded(Mixed)
    base = state(model)
    adapt(model, dora=dora)
    source, adapter = written(model, base, tmp_path)
    monkeypatch.setattr(new_values, "BAND", entries)
    audit = lora_fx.fold_checkpoint(source, adapter, tmp_path / "out.safetensors")
    lora_fx.fold(model)
    found, wanted = load_file(tmp_path / "out.safetensors"), state(model)
    for name, tensor in wanted.items():
        # Products of other shapes may take other kernels, which add in another order.
        rounding = 2 * torch.finfo(tensor.dtype).eps * float(tensor.abs().max())
        assert float((found[name] - tensor).abs().max()) <= rounding, name
    monkeypatch.undo()
    whole = lora_fx.fold_checkpoint(source, adapter, tmp_path / "whole.safetensors")
    for one, other in zip(audit.rows, whole.rows, strict=True):
        assert one.delta == pytest.approx(other.delta, rel=1e-5)


def bert(folder: Path, size: str = "3KB") -> tuple[Any, dict[str, Tensor], Path]:
    """A small BERT for classification as save_pretrained shards it, and its inputs."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=3, **sizes)
    model = seeded(lambda: transformers.BertForSequenceClassification(config))
    model.save_pretrained(folder, max_shard_size=size)
    return model, {"input_ids": torch.arange(12).reshape(2, 6)}, folder


def test_a_sharded_folder_of_transformers_loads_as_the_folded_model(tmp_path: Path) -> None:
    model, inputs, base = bert(tmp_path / "base")
    (base / "tokenizer.json").write_text('{"a": "tokenizer"}')
    (base / "pytorch_model.bin").write_text("the base's weights")
    (base / "runs").mkdir()
    policy = Policy(Train(module="classifier"), Rule(role="qv", rank=2), Rule(kind="embedding", rank=2))
    lora_fx.inject(model, policy, inputs, seed=0)
    randomise(model)
    lora_fx.save_adapter(model, tmp_path / "task.safetensors")
    audit = lora_fx.fold_checkpoint(base, tmp_path / "task.safetensors", tmp_path / "out")
    assert audit.notes[-1] == "not copied, being no part of this checkpoint: pytorch_model.bin, runs"
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 5
    kept = ["config.json", "model.safetensors.index.json", "tokenizer.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*shards, *kept])
    for name in kept:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        injected = model(**inputs).logits
    lora_fx.fold(model)
    assert_same(loaded.state_dict(), model.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        torch.testing.assert_close(loaded(**inputs).logits, injected)


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors"])
def test_a_folder_with_one_file(name: str, tmp_path: Path) -> None:
    model, base = trained()
    source, adapter = written(model, base, tmp_path)
    (tmp_path / "base").mkdir()
    source.rename(tmp_path / "base" / name)
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "out").mkdir()
    lora_fx.fold_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {name, "config.json"}
    lora_fx.fold(model)
    assert_same(load_file(tmp_path / "out" / name), state(model))


def test_a_prefix_is_taken_where_the_fingerprints_prove_it(tmp_path: Path) -> None:
    model, inputs, _ = bert(tmp_path / "base")
    head = state(model)
    body = model.bert
    backbone = state(body)
    lora_fx.inject(body, Policy(Rule(role="qv", rank=2)), inputs, seed=0)
    randomise(body)
    lora_fx.save_adapter(body, tmp_path / "body.safetensors")
    audit = lora_fx.fold_checkpoint(tmp_path / "base", tmp_path / "body.safetensors", tmp_path / "out")
    assert "the adapter's with 'bert.' before; the fingerprints agree" in audit.notes[-1]
    lora_fx.fold(body)
    assert_same(type(model).from_pretrained(tmp_path / "out").state_dict(), model.state_dict())
    # The reverse: adapted as a part of the whole, folded into the part alone.
    model.load_state_dict(head)
    lora_fx.inject(model, Policy(Rule(role="qv", rank=2)), inputs, seed=0)
    randomise(model)
    source, adapter = written(model, backbone, tmp_path)
    audit = lora_fx.fold_checkpoint(source, adapter, tmp_path / "part.safetensors")
    assert "the adapter's without 'bert.'" in audit.notes[-1]
    lora_fx.fold(model)
    assert_same(load_file(tmp_path / "part.safetensors"), state(model.bert))


def test_one_of_two_towers_is_found_by_its_values_and_never_by_names(tmp_path: Path) -> None:
    model, base = trained()
    other = {name: tensor + 1 for name, tensor in base.items()}
    towers = {f"left.{n}": t for n, t in other.items()} | {f"right.{n}": t for n, t in base.items()}
    source, adapter = written(model, towers, tmp_path)
    out = tmp_path / "out.safetensors"
    audit = lora_fx.fold_checkpoint(source, adapter, out)
    assert "'right.'" in audit.notes[-1]
    lora_fx.fold(model)
    wanted = {n: t for n, t in towers.items() if n.startswith("left.")}
    assert_same(load_file(out), wanted | {f"right.{n}": t for n, t in state(model).items()})
    with pytest.raises(lora_fx.BaseMismatchError, match=r"'left\.' before or with 'right\.' before, but no"):
        lora_fx.fold_checkpoint(source, adapter, tmp_path / "x", base_check="shape")
    save_file({f"left.{n}": t for n, t in other.items()}, source)
    with pytest.raises(
        lora_fx.BaseMismatchError, match=r"names fit with 'left\.' before, but no fingerprint"
    ):
        lora_fx.fold_checkpoint(source, adapter, tmp_path / "x")
    save_file({f"{side}.{n}": t.clone() for n, t in base.items() for side in ("left", "right")}, source)
    with pytest.raises(lora_fx.BaseMismatchError, match="more than once"):
        lora_fx.fold_checkpoint(source, adapter, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def _another_base(folder: Path, base: dict[str, Tensor]) -> None:
    save_file(base | {"0.weight": base["0.weight"] + 1e-3}, folder / "base.safetensors")


def _a_weight_less(folder: Path, base: dict[str, Tensor]) -> None:
    save_file({n: t for n, t in base.items() if n != "2.weight"}, folder / "base.safetensors")


def _another_shape(folder: Path, base: dict[str, Tensor]) -> None:
    save_file(base | {"2.weight": torch.zeros(4, 9)}, folder / "base.safetensors")


def _cut(folder: Path, base: dict[str, Tensor]) -> None:
    path = folder / "base.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _no_safetensors(folder: Path, base: dict[str, Tensor]) -> None:
    (folder / "base.safetensors").write_bytes(b"PK\3\4 a pickle")


def _quantised(folder: Path, base: dict[str, Tensor]) -> None:
    weight = base["0.weight"].to(torch.float8_e4m3fn)
    save_file(base | {"0.weight": weight}, folder / "base.safetensors")


BAD_BASES: dict[str, tuple[Callable[[Path, dict[str, Tensor]], None], type[lora_fx.LoraFxError], str]] = {
    "another base": (_another_base, lora_fx.BaseMismatchError, r"1 of 2 weights differ \(0\.weight: other"),
    "a weight less": (
        _a_weight_less,
        lora_fx.BaseMismatchError,
        r"1 of 2 not there \(2\.weight\).*0\.weight",
    ),
    "another shape": (_another_shape, lora_fx.BaseMismatchError, r"2\.weight: shape \(4, 9\), not \(4, 8\)"),
    "cut": (_cut, lora_fx.CheckpointError, "base.safetensors: expected a safetensors file, whole"),
    "no safetensors": (_no_safetensors, lora_fx.CheckpointError, "base.safetensors: expected a safetensors"),
    "quantised": (_quantised, lora_fx.CheckpointError, "0.weight: .*F8_E4M3"),
}


@pytest.mark.parametrize("case", BAD_BASES)
def test_another_or_a_damaged_checkpoint_is_refused_by_name(case: str, tmp_path: Path) -> None:
    damage, error, text = BAD_BASES[case]
    model, base = trained()
    source, adapter = written(model, base, tmp_path)
    damage(tmp_path, base)
    with pytest.raises(error, match=text):
        lora_fx.fold_checkpoint(source, adapter, tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "task.safetensors"]


def test_an_adapter_with_nan_or_an_overflow_is_refused(tmp_path: Path) -> None:
    model, base = trained(dtype=torch.float16)
    source, adapter = written(model, base, tmp_path)
    for value in (float("nan"), 1e9):
        file = AdapterFile.read(adapter)
        file.tensors["2.weight/B"][0] = value
        with pytest.raises(lora_fx.AdapterValueError, match=r"2\.weight"):
            lora_fx.fold_checkpoint(source, file, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path: Path) -> None:
    _, _, base = bert(tmp_path / "base")
    index = base / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    key, name = min(good["weight_map"].items())
    other = next(each for each in good["weight_map"].values() if each != name)
    cases: dict[str, tuple[dict[str, str], str]] = {
        "a key more": ({"no.such": name}, "no.such.*missing from the file"),
        "in another file": ({key: other}, f"{key}.*missing from the file"),
        "elsewhere": ({key: "../outside.safetensors"}, "not there"),
        "no such file": ({key: "gone.safetensors"}, "gone.safetensors, which is not there"),
    }
    file = AdapterFile(lora_fx.Plan(()), {}, {})
    for change, text in cases.values():
        index.write_text(json.dumps(good | {"weight_map": good["weight_map"] | change}))
        with pytest.raises(lora_fx.CheckpointError, match=text):
            lora_fx.fold_checkpoint(base, file, tmp_path / "out")
    fewer = {k: v for k, v in good["weight_map"].items() if k != key}
    index.write_text(json.dumps(good | {"weight_map": fewer}))
    with pytest.raises(lora_fx.CheckpointError, match=f"{key}.*it there all the same"):
        lora_fx.fold_checkpoint(base, file, tmp_path / "out")
    index.write_text("not JSON")
    with pytest.raises(lora_fx.CheckpointError, match=r"index\.json"):
        lora_fx.fold_checkpoint(base, file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_and_what_must_not_be_written(tmp_path: Path) -> None:
    model, base = trained()
    source, adapter = written(model, base, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "link.safetensors").symlink_to(source)
    for missing, kept in ((tmp_path / "none", adapter), (source, tmp_path / "none")):
        with pytest.raises(lora_fx.LoraFxError, match=r"none: expected.*no such file") as said:
            lora_fx.fold_checkpoint(missing, kept, tmp_path / "out.safetensors")
        assert isinstance(said.value, FileNotFoundError)
    for target in (source, adapter, tmp_path / "link.safetensors", tmp_path):
        with pytest.raises(lora_fx.CheckpointError):
            lora_fx.fold_checkpoint(source, adapter, target)
    folder, full = tmp_path / "base", tmp_path / "full"
    folder.mkdir()
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    with pytest.raises(lora_fx.CheckpointError, match="no safetensors file"):
        lora_fx.fold_checkpoint(folder, adapter, tmp_path / "out")
    (folder / "pytorch_model.bin").write_text("")
    with pytest.raises(lora_fx.CheckpointError, match=r"pytorch_model\.bin.*unpickles"):
        lora_fx.fold_checkpoint(folder, adapter, tmp_path / "out")
    for name in ("a.safetensors", "b.safetensors"):
        save_file(base, folder / name)
    with pytest.raises(lora_fx.CheckpointError, match=r"a\.safetensors, b\.safetensors"):
        lora_fx.fold_checkpoint(folder, adapter, tmp_path / "out")
    save_file(base, folder / "model.safetensors")
    for target in (folder, full, adapter):
        with pytest.raises(lora_fx.CheckpointError):
            lora_fx.fold_checkpoint(folder, adapter, target)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name in before} == before
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failure_on_the_way_leaves_nothing_behind(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base = trained()
    source, adapter = written(model, base, tmp_path)
    target = tmp_path / "out.safetensors"
    if kind == "folder":
        (tmp_path / "base").mkdir()
        source.rename(tmp_path / "base" / "model.safetensors")
        (tmp_path / "base" / "config.json").write_text("{}")
        source, target = tmp_path / "base", tmp_path / "out"
    else:
        target.write_text("an older file")
    before = sorted(path.name for path in tmp_path.iterdir())
    calls = iter(range(100))

    def fail(handle: int) -> None:
        if kind == "file" or next(calls) == 1:
            raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            lora_fx.fold_checkpoint(source, adapter, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    if kind == "file":
        assert target.read_text() == "an older file"
    lora_fx.fold_checkpoint(source, adapter, target)
    assert target.exists()


def test_progress_is_told_for_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = told_progress(monkeypatch)
    model, base = trained()
    source, adapter = written(model, base, tmp_path)
    lora_fx.fold_checkpoint(source, adapter, tmp_path / "out.safetensors", progress=True)
    size = sum(tensor.nbytes for tensor in base.values())
    assert told[0] == (size, 0)
    assert sum(count for _, count in told) == size
    assert len(told) == 1 + len(base)


def test_no_model_is_built_and_metadata_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = trained()
    source, adapter = written(model, base, tmp_path)
    monkeypatch.setattr(nn.Module, "__init__", lambda self: pytest.fail("a module was built"))
    lora_fx.fold_checkpoint(source, adapter, tmp_path / "out.safetensors")
    assert fold_module.fold_checkpoint is lora_fx.fold_checkpoint
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "made": "by a test"}
