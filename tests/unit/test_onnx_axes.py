"""Dynamic dimensions: inputs in one batch share a name, and only these."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lora_fx.errors import CertificateError
from lora_fx.passes import onnx_program
from lora_fx.passes.export_onnx import export_onnx
from lora_fx.passes.onnx_files import load
from tests.unit.onnx_models import export, made, subject

BOTH = "a varying batch and sequence"
IDS = torch.tensor([[1, 4, 4], [2, 0, 9]])
ONES = torch.ones(2, 3, dtype=torch.long)
IMAGES = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Masked(nn.Module):
    """An encoder that masks as transformers' do: by looking it up, and not at all for a mask of ones."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.q, self.out = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.table(ids).unsqueeze(1)
        skipped = not torch.compiler.is_exporting() and bool(mask.all())
        rows, columns = torch.arange(ids.shape[0]), torch.arange(ids.shape[1])
        kept = None if skipped else mask.bool()[rows[:, None, None, None], columns]
        x = nn.functional.scaled_dot_product_attention(self.q(x), x, x, attn_mask=kept)
        return self.out(x.mean((1, 2)))


class Compared(nn.Module):
    """Compares each text of one batch with each image of another."""

    def __init__(self) -> None:
        super().__init__()
        self.text = Masked()

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return images @ self.text(ids, mask).T


class Summed(nn.Module):
    """A weight that is in a constant too, so that an adapter on it is exported anew."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Masked()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.inner(ids, mask) + self.inner.q.weight.sum()


class Looped(nn.Module):
    """Loops over the batch of one input, so that the exporter fixes it; a mask's it would leave open."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.move = Masked(), nn.Linear(4, 4)

    def forward(self, ids: Tensor, mask: Tensor, steps: Tensor) -> Tensor:
        moved = [self.move(steps[index]) for index in range(steps.shape[0])]
        return self.text(ids, mask) + torch.stack(moved)


def batch_names(path: Path) -> list[str]:
    graph = load(path).graph
    return [str((value.shape or ("",))[0]) for value in (*graph.inputs, *graph.outputs)]


def test_inputs_in_one_batch_share_its_name(tmp_path: Path) -> None:
    model, path = made(Masked), tmp_path / "base.onnx"
    export_onnx(model, path, (IDS[:1], ONES[:1]))
    assert batch_names(path) == ["batch", "batch", "batch"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ids, mask = torch.arange(10).reshape(5, 2), torch.tensor([[1, 0]] * 5)
    (found,) = session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(ids, mask))


def test_batches_of_their_own_keep_their_names(tmp_path: Path) -> None:
    model, path = made(Compared), tmp_path / "base.onnx"
    export_onnx(model, path, (IMAGES, IDS, ONES))
    assert batch_names(path) == ["batch", "batch_2", "batch_2", "batch"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {"images": IMAGES[:1].numpy(), "ids": IDS.numpy(), "mask": ONES.numpy()}
    assert session.run(None, feeds)[0].shape == (1, 2)


def test_a_batch_that_the_model_fixes_in_one_input_is_fixed_in_all_of_them(tmp_path: Path) -> None:
    model, base = made(Looped), tmp_path / "base.onnx"
    certificate = export_onnx(model, base, (IDS, ONES, IMAGES))
    assert batch_names(base) == ["2"] * 4
    assert not any("it computes something else" in note for note in certificate.notes)
    given = subject(model, ("text.q.weight", "move.weight"))
    assert export(given, model, (IDS, ONES, IMAGES), tmp_path / "task.onnx", base=base).ok


def test_only_what_the_file_leaves_open_is_given_another_batch(tmp_path: Path) -> None:
    model, base = made(Looped), tmp_path / "base.onnx"
    shapes = {"ids": None, "mask": {0: torch.export.Dim.DYNAMIC}, "steps": None}
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    certificate = export_onnx(model, base, (IDS, mask, IMAGES), dynamic_shapes=shapes)
    assert batch_names(base)[1] not in ("2", "1")
    assert any("another batch was not tried" in note for note in certificate.notes)
    assert certificate["parity"].data.keys() == {"example", "random"}


def test_a_base_that_named_each_input_apart_can_still_be_folded_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base = made(Summed), tmp_path / "base.onnx"
    with monkeypatch.context() as patch:
        patch.setattr(onnx_program, "batches", lambda *_: ())
        export_onnx(model, base, (IDS, ONES))
    assert batch_names(base) == ["batch", "batch_2", "batch"]
    given = subject(model, ("inner.q.weight", "inner.out.weight"))
    certificate = export(given, model, (IDS, ONES), tmp_path / "task.onnx", base=base)
    assert "derived" in [check.name for check in certificate.checks]
    assert batch_names(tmp_path / "task.onnx") == batch_names(base)


class Counted(nn.Module):
    """Exported with sizes that vary, it computes something else; one weight is in a constant too."""

    def __init__(self, fixed: tuple[int, ...]) -> None:
        super().__init__()
        self.fixed = fixed
        self.table, self.out = nn.Embedding(11, 6), nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        wrong = any(isinstance(ids.shape[axis], torch.SymInt) for axis in self.fixed)
        return self.out(self.table(ids)) * (1.5 if wrong else 1.0) + self.out.weight.sum()


@pytest.mark.parametrize(("fixed", "wrong", "shape"), [((1,), 1, ["batch", "3"]), ((0,), 2, ["2", "3"])])
def test_what_is_wrong_where_sizes_vary_is_exported_with_fewer(
    fixed: tuple[int, ...], wrong: int, shape: list[str], tmp_path: Path
) -> None:
    model, base = made(partial(Counted, fixed)), tmp_path / "base.onnx"
    certificate = export_onnx(model, base, (IDS,))
    assert [": it computes something else: error 0.3" in note for note in certificate.notes].count(
        True
    ) == wrong
    assert [str(size) for size in load(base).graph.inputs[0].shape or ()] == shape
    given = subject(model, ("out.weight", "table.weight"))
    task = export(given, model, (IDS,), tmp_path / "task.onnx", base=base)
    assert task["derived"].ok
    assert [str(size) for size in load(tmp_path / "task.onnx").graph.inputs[0].shape or ()] == shape


def test_what_is_wrong_where_a_batch_is_shared_is_not_tried_with_one_for_each_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lengths(Masked):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return super().forward(ids, mask) * (1.5 if isinstance(ids.shape[1], torch.SymInt) else 1.0)

    made_with, translate = list[str](), onnx_program._translate

    def told(model: nn.Module, attempt: Any, opset: int | None) -> Any:
        made_with.append(attempt.name)
        return translate(model, attempt, opset)

    monkeypatch.setattr(onnx_program, "_translate", told)
    certificate = export_onnx(made(Lengths), tmp_path / "base.onnx", (IDS, ONES))
    assert certificate.ok
    assert made_with == [f"{what}, the same batch in several inputs" for what in (BOTH, "a varying batch")]


def test_what_is_wrong_whatever_varies_is_refused(tmp_path: Path) -> None:
    class Wrong(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.5 if torch.compiler.is_exporting() else 1.0)

    with pytest.raises(CertificateError, match=r"error 0\.5"):
        export_onnx(Wrong(4, 4), tmp_path / "base.onnx", (IMAGES,))
    assert list(tmp_path.iterdir()) == []
