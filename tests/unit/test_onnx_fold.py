"""Folding an adapter file into a base file: bit-equal to a new export, streamed, refused where unknown."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from lora_fx import fingerprints
from lora_fx.adapter_file import AdapterFile
from lora_fx.errors import BaseMismatchError, ExportError
from lora_fx.fingerprints import fingerprint
from lora_fx.kinds.base import LivePart, since_start
from lora_fx.kinds.effective import effective_band, effective_weight
from lora_fx.matrix import columns_form, rows_form
from lora_fx.passes import new_values, onnx_files
from lora_fx.passes.certify import certify
from lora_fx.passes.certify_values import ulps
from lora_fx.passes.compare_latency import compare_latency
from lora_fx.passes.export_onnx import export_onnx
from lora_fx.passes.fold_onnx import fold_onnx
from lora_fx.passes.onnx_diff import compare
from lora_fx.passes.onnx_metadata import BASE_DATA_KEY, DATA_KEY, PLAN_KEY, read_changes
from lora_fx.passes.onnx_tensors import as_torch, can_hold_weights
from lora_fx.passes.switch_onnx import switch_onnx
from lora_fx.plans import Plan
from tests.told_progress import told_progress
from tests.unit.onnx_adapters import adapter, subject_with
from tests.unit.onnx_models import Mixed, Tied, export, made

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
IDS = torch.arange(14).reshape(2, 7)


@pytest.fixture(autouse=True)
def weights_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are written as large ones are: weights in a data file."""
    monkeypatch.setattr(onnx_files, "INLINE_LIMIT", 0)
    monkeypatch.setattr(onnx_files, "ALWAYS_INLINE", 64)


@pytest.fixture(scope="module")
def mixed() -> nn.Module:
    return made(Mixed)


@pytest.fixture(scope="module")
def mixed_adapter(mixed: nn.Module) -> AdapterFile:
    names = ("conv.weight", "qkv.weight", "o.weight", "p.weight")
    return adapter(mixed, names, full=("head.weight", "head.bias"), dora=("p.weight",))


@pytest.fixture(scope="module")
def mixed_base(mixed: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_files, "INLINE_LIMIT", 0)
        patch.setattr(onnx_files, "ALWAYS_INLINE", 64)
        export_onnx(mixed, folder / "base.onnx", IMAGE)
    return folder / "base.onnx"


def same_weights(a: Path, b: Path) -> None:
    comparison = compare(onnx_files.load(a), onnx_files.load(b))
    assert comparison.difference is None
    for ours, theirs in comparison.pairs:
        assert ours.const_value.tobytes() == theirs.const_value.tobytes(), ours.name


@pytest.mark.parametrize("standalone", [False, True])
def test_bit_equal_to_exporting_the_folded_model(
    mixed: nn.Module, mixed_adapter: AdapterFile, mixed_base: Path, standalone: bool
) -> None:
    out = mixed_base.parent / f"task{standalone}.onnx"
    mixed_adapter.write(mixed_base.parent / "task.safetensors")
    certificate = fold_onnx(mixed_base, mixed_base.parent / "task.safetensors", out, standalone=standalone)
    assert certificate.ok
    assert certificate["delta"].data["ulps"] == 0
    assert certificate.folded == out.name
    with subject_with(mixed, mixed_adapter).folded_state() as folded:
        export_onnx(folded, mixed_base.parent / "full.onnx", IMAGE)
    same_weights(out, mixed_base.parent / "full.onnx")
    for file in ("full.onnx", out.name):
        session = onnxruntime.InferenceSession(
            str(mixed_base.parent / file), providers=["CPUExecutionProvider"]
        )
        (found,) = session.run(None, {"image": IMAGE.numpy()})
        if file == "full.onnx":
            expected = found
    assert (found == expected).all()
    metadata = onnx_files.load(out).metadata_props
    assert Plan.from_json(metadata[PLAN_KEY]) == mixed_adapter.plan
    assert (BASE_DATA_KEY in metadata) == (not standalone)


def test_an_overlay_is_small_and_records_the_hash_of_its_base(
    mixed_adapter: AdapterFile, mixed_base: Path, tmp_path: Path
) -> None:
    out = mixed_base.parent / "small.onnx"
    fold_onnx(mixed_base, mixed_adapter, out)
    metadata = onnx_files.load(out).metadata_props
    (own,) = json.loads(metadata[DATA_KEY])
    (base,) = json.loads(metadata[BASE_DATA_KEY])
    data = mixed_base.parent / base["name"]
    assert onnx_files.file_sha256(data) == base["sha256"]
    assert own["size"] < base["size"]
    assert (mixed_base.parent / own["name"]).stat().st_size == own["size"]
    certificate = certify(mixed_base, out, adapter=mixed_adapter)
    assert certificate.ok
    assert certificate["base-data"].ok


def test_an_overlay_over_changed_data_fails(
    mixed_adapter: AdapterFile, mixed_base: Path, tmp_path: Path
) -> None:
    for file in mixed_base.parent.glob("base.onnx*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    base, out = tmp_path / "base.onnx", tmp_path / "task.onnx"
    fold_onnx(base, mixed_adapter, out)
    (data,) = tmp_path.glob("base.onnx.*.data")
    content = bytearray(data.read_bytes())
    content[-4:] = b"\0\0\x80?"
    data.write_bytes(content)
    certificate = certify(base, out, adapter=mixed_adapter)
    assert not certificate["base-data"].ok
    assert certificate["base-data"].place == data.name
    data.write_bytes(content[:-4])
    assert not certify(base, out, adapter=mixed_adapter)["base-data"].ok


def test_overlay_in_a_folder_above_and_not_below(
    mixed_adapter: AdapterFile, mixed_base: Path, tmp_path: Path
) -> None:
    above = mixed_base.parent.parent / "above.onnx"
    assert fold_onnx(mixed_base, mixed_adapter, above).ok
    onnxruntime.InferenceSession(str(above), providers=["CPUExecutionProvider"])
    with pytest.raises(ExportError, match="standalone=True"):
        fold_onnx(mixed_base, mixed_adapter, tmp_path / "aside.onnx")
    assert not list(tmp_path.iterdir())
    assert fold_onnx(mixed_base, mixed_adapter, tmp_path / "aside.onnx", standalone=True).ok


@pytest.mark.parametrize("entries", [1, 40, 10**9])
def test_large_weights_are_changed_in_parts(
    entries: int, mixed: nn.Module, mixed_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place and part by part it is the same weight, told to be changed by as much."""
    names = ("qkv.weight", "o.weight", "p.weight")
    file = adapter(mixed, names, full=("head.weight",), dora=("p.weight",))
    wanted, found = tmp_path / "whole.onnx", tmp_path / "parts.onnx"
    assert fold_onnx(mixed_base, file, wanted, standalone=True).ok
    monkeypatch.setattr(new_values, "BAND", entries)
    assert fold_onnx(mixed_base, file, found, standalone=True).ok
    comparison = compare(onnx_files.load(wanted), onnx_files.load(found))
    assert comparison.difference is None
    for a, b in comparison.pairs:
        if not can_hold_weights(a.const_value):
            continue
        ours, theirs = as_torch(a.const_value), as_torch(b.const_value)
        assert ulps(theirs, ours, ours) <= 2, a.name
    extents = [read_changes(onnx_files.load(path).metadata_props) for path in (wanted, found)]
    for name, extent in extents[0].items():
        assert vars(extents[1][name]) == pytest.approx(vars(extent), rel=1e-5)


def test_a_part_of_an_effective_weight_is_the_part_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    for form in (rows_form((7, 5)), rows_form((7, 2, 3)), columns_form((7, 5))):
        base, rows = draw(*form.shape), ((1, 3), (4, 5))
        a, start = draw(2, form.in_features), (draw(2, form.in_features), draw(3, 2))
        moved = since_start(LivePart(a, draw(3, 2), 0.5, rows), start)
        parts = (*moved, LivePart(draw(2, form.in_features), draw(form.out_features, 2), 2.0))
        for magnitude in (None, draw(form.out_features)):
            whole = effective_weight(base, form, parts, magnitude)
            for first, last in ((0, 2), (2, 3), (3, 7), (5, 7)):
                found = effective_band(base[first:last], first, form, parts, magnitude)
                if form == columns_form((7, 5)) and magnitude is not None:
                    assert found is None
                else:
                    torch.testing.assert_close(found, whole[first:last])


def test_a_weight_is_hashed_in_parts_as_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(9, 7)
    monkeypatch.setattr(fingerprints, "_PART", 10)
    for view in (weight.t(), weight, weight[:, 1:], weight[0], weight[0, 0], weight[:0]):
        assert fingerprint(view) == fingerprint(view.clone(memory_format=torch.contiguous_format))


def test_progress_is_told_for_every_byte_of_the_changed_weights(
    mixed_base: Path, mixed_adapter: AdapterFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = told_progress(monkeypatch)
    out = mixed_base.parent / "told.onnx"
    fold_onnx(mixed_base, mixed_adapter, out, progress=True, certify=False)
    external = sum(count for _, count in told)
    (own,) = json.loads(onnx_files.load(out).metadata_props[DATA_KEY])
    assert len(told) > 3
    assert 0 < external <= told[0][0]
    assert external <= own["size"]
    fold_onnx(mixed_base, mixed_adapter, out, certify=False)
    assert sum(count for _, count in told) == external


def test_tied_weight_changes_in_both_places(tmp_path: Path) -> None:
    model = made(Tied)
    file = adapter(model, ("emb.weight", "up.weight"))
    export_onnx(model, tmp_path / "base.onnx", IDS)
    fold_onnx(tmp_path / "base.onnx", file, tmp_path / "task.onnx")
    export(subject_with(model, file), model, IDS, tmp_path / "full.onnx")
    same_weights(tmp_path / "task.onnx", tmp_path / "full.onnx")


def test_a_base_of_another_make_is_matched_by_fingerprints(tmp_path: Path) -> None:
    model = made(Tied)
    file = adapter(model, ("emb.weight", "up.weight"))
    torch.onnx.export(model.eval(), (IDS,), tmp_path / "foreign.onnx", dynamo=True, verbose=False)
    certificate = fold_onnx(tmp_path / "foreign.onnx", file, tmp_path / "task.onnx")
    assert certificate.ok
    assert any("fingerprints" in note for note in certificate.notes)
    session = onnxruntime.InferenceSession(str(tmp_path / "task.onnx"), providers=["CPUExecutionProvider"])
    with subject_with(model, file).folded_state() as folded, torch.no_grad():
        expected = folded(IDS)
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"ids": IDS.numpy()})[0]), expected)


def test_another_base_is_refused(mixed_base: Path, tmp_path: Path) -> None:
    other = adapter(made(Mixed, seed=9), ("conv.weight", "o.weight"))
    with pytest.raises(BaseMismatchError, match="2 of 2 weights differ"):
        fold_onnx(mixed_base, other, tmp_path / "task.onnx", standalone=True)
    assert not list(tmp_path.iterdir())
    assert fold_onnx(mixed_base, other, tmp_path / "task.onnx", standalone=True, base_check="shape").ok


def test_what_cannot_be_patched_is_refused_by_name(
    mixed: nn.Module, mixed_base: Path, tmp_path: Path
) -> None:
    file = adapter(mixed, ("o.weight",), full=("conv.bias",))
    with pytest.raises(ExportError, match=r"conv\.bias"):
        fold_onnx(mixed_base, file, tmp_path / "task.onnx", standalone=True)
    assert not list(tmp_path.iterdir())


def test_another_adapter_fails_the_certificate(
    mixed: nn.Module, mixed_adapter: AdapterFile, mixed_base: Path
) -> None:
    out = mixed_base.parent / "other.onnx"
    fold_onnx(mixed_base, mixed_adapter, out)
    other = adapter(mixed, tuple(mixed_adapter.fingerprints), full=("head.weight", "head.bias"), seed=8)
    certificate = certify(mixed_base, out, adapter=other)
    assert [check.name for check in certificate.failures] == ["delta"]
    fewer = adapter(mixed, ("qkv.weight",))
    names = [check.name for check in certify(mixed_base, out, adapter=fewer).failures]
    assert "untouched" in names


class Positions(nn.Module):
    """A table of positions bounds a sequence that the graph leaves open."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.proj, self.positions = nn.Linear(6, 6), nn.Parameter(torch.randn(1, most, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.proj(x) + self.positions[:, : x.shape[1]]
        return hidden


@pytest.mark.parametrize("most", [7, 40])
def test_a_sequence_bounded_by_a_table_is_tried_within_its_bounds(most: int, tmp_path: Path) -> None:
    model = made(lambda: Positions(most))
    base, task, switch = (tmp_path / name for name in ("base.onnx", "task.onnx", "switch.onnx"))
    export_onnx(model, base, torch.randn(2, 5, 6))
    file = adapter(model, ("proj.weight",))
    certificate = fold_onnx(base, file, task)
    assert certificate.ok
    assert certificate["effect"].ok
    session = onnxruntime.InferenceSession(base, providers=["CPUExecutionProvider"])
    assert not isinstance(session.get_inputs()[0].shape[1], int), "the sequence is open"
    assert compare_latency(base, task, seconds=0.02, sets=1, min_rounds=2).rounds >= 2
    assert switch_onnx(base, file, switch).ok
