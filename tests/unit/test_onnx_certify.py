"""The certificate: every single tampering makes it fail, with the check and the place named."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapter_file import AdapterFile
from lora_fx.certificates import Certificate, Check
from lora_fx.errors import CertificateError
from lora_fx.passes import certify_errors, certify_parity, onnx_files
from lora_fx.passes.certify import certify
from lora_fx.passes.certify_values import ulps
from lora_fx.passes.export_onnx import export_onnx
from lora_fx.passes.fold_onnx import fold_onnx
from lora_fx.passes.onnx_parity import distance
from lora_fx.passes.onnx_subject import Subject
from lora_fx.passes.rounding_noise import RoundingNoise
from tests.unit.onnx_adapters import adapter, subject_with
from tests.unit.onnx_models import Mixed, export, export_pair, made, subject

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
Tamper = Callable[[ir.Model], None]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, AdapterFile]:
    """A base, a folded file and its adapter; ``o`` and ``p`` are of one shape, ``norm`` is not adapted."""
    folder = tmp_path_factory.mktemp("files")
    model = made(Mixed)
    file = adapter(model, ("conv.weight", "qkv.weight", "o.weight", "p.weight"), full=("head.weight",))
    export_onnx(model, folder / "base.onnx", IMAGE)
    fold_onnx(folder / "base.onnx", file, folder / "task.onnx")
    return folder / "base.onnx", folder / "task.onnx", file


def find(model: ir.Model, op: str, index: int = 0) -> ir.Node:
    return [node for node in model.graph if node.op_type == op][index]


def weight_of(model: ir.Model, op: str, index: int = 0) -> ir.Value:
    value = find(model, op, index).inputs[1]
    assert value is not None
    return value


def put(value: ir.Value, content: torch.Tensor) -> None:
    value.const_value = ir.tensor(content.numpy(), name=value.name)


def held(value: ir.Value) -> torch.Tensor:
    assert value.const_value is not None
    return torch.from_numpy(value.const_value.numpy().copy())


def attribute(m: ir.Model) -> None:
    find(m, "LayerNormalization").attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)


def edge(m: ir.Model) -> None:
    find(m, "Sub").replace_input_with(0, find(m, "Sub").inputs[1])


def extra_node(m: ir.Model) -> None:
    relu = find(m, "Relu")
    extra = ir.node("Identity", [relu.inputs[0]])
    m.graph.insert_before(relu, extra)
    extra.outputs[0].name = "extra"
    relu.replace_input_with(0, extra.outputs[0])


def extra_dead_node(m: ir.Model) -> None:
    dead = ir.node("Exp", [find(m, "Relu").inputs[0]])
    dead.outputs[0].name = "dead"
    m.graph.append(dead)


def output_renamed(m: ir.Model) -> None:
    m.graph.outputs[0].name = "result"


def input_renamed(m: ir.Model) -> None:
    m.graph.inputs[0].name = "picture"


def opset(m: ir.Model) -> None:
    m.opset_imports[""] = 21


def domain(m: ir.Model) -> None:
    m.opset_imports["com.example"] = 1
    find(m, "Relu").domain = "com.example"


def integer(m: ir.Model) -> None:
    value = find(m, "Reshape").inputs[1]
    assert value is not None
    content = held(value)
    content[content == 8] = -1
    put(value, content)


def dtype(m: ir.Model) -> None:
    put(weight_of(m, "Gemm"), held(weight_of(m, "Gemm")).double())


def shape(m: ir.Model) -> None:
    value = weight_of(m, "Gemm")
    put(value, held(value)[:9])


def input_shape(m: ir.Model) -> None:
    m.graph.inputs[0].shape = ir.Shape([2, 3, 8, 8])


def swapped(m: ir.Model) -> None:
    sub, attention = matmuls(m)["p"], matmuls(m)["o"]
    first, second = held(sub), held(attention)
    put(sub, second)
    put(attention, first)


def matmuls(m: ir.Model) -> dict[str, ir.Value]:
    """The weights of ``o`` and ``p``, by the order in which they are multiplied with."""
    square = [
        node.inputs[1]
        for node in m.graph
        if node.op_type == "MatMul" and node.inputs[1] is not None and node.inputs[1].is_initializer()
        if held(node.inputs[1]).shape == (8, 8)
    ]
    return dict(zip(("o", "p"), square, strict=True))


def scaled(m: ir.Model) -> None:
    value = weight_of(m, "Conv")
    put(value, held(value) * 1.001)


def poisoned(m: ir.Model) -> None:
    value = weight_of(m, "Gemm")
    content = held(value)
    content[0, 0] = float("nan")
    put(value, content)


def one_element(m: ir.Model) -> None:
    value = matmuls(m)["o"]
    content = held(value)
    content[3, 3] *= 1 + 1e-5
    put(value, content)


def not_adapted(m: ir.Model) -> None:
    value = find(m, "LayerNormalization").inputs[1]
    assert value is not None
    put(value, held(value) + 1e-6)


def bias_poisoned(m: ir.Model) -> None:
    value = find(m, "Gemm").inputs[2]
    assert value is not None
    put(value, held(value) * float("inf"))


@pytest.mark.parametrize(
    ("tamper", "check", "place"),
    [
        (attribute, "structure", "attribute epsilon"),
        (edge, "structure", "input 0 of node"),
        (extra_node, "structure", "(Relu)"),
        (extra_dead_node, "structure", "reaches no output"),
        (output_renamed, "structure", "graph output 0"),
        (input_renamed, "structure", "graph input 0"),
        (opset, "structure", "opset"),
        (domain, "structure", "opset"),
        (integer, "structure", "initializer"),
        (dtype, "structure", "initializer"),
        (shape, "structure", "initializer"),
        (input_shape, "structure", "graph input 0"),
        (swapped, "delta", "initializer"),
        (scaled, "delta", "'conv.weight'"),
        (poisoned, "delta", "'head.weight'"),
        (one_element, "delta", "initializer"),
        (not_adapted, "untouched", "'norm.weight'"),
        (bias_poisoned, "untouched", "'head.bias'"),
    ],
)
def test_a_single_tampering_fails_and_is_named(
    tamper: Tamper, check: str, place: str, files: tuple[Path, Path, AdapterFile], tmp_path: Path
) -> None:
    base, folded, file = files
    model = onnx_files.load(folded)
    tamper(model)
    onnx_files.save(model, tmp_path / "task.onnx")
    certificate = certify(base, tmp_path / "task.onnx", adapter=file)
    assert not certificate.ok
    assert check in [failed.name for failed in certificate.failures]
    assert place in certificate[check].place
    with pytest.raises(CertificateError):
        certificate.raise_for_failure()


def test_each_untouched_initializer_is_named(files: tuple[Path, Path, AdapterFile], tmp_path: Path) -> None:
    base, folded, file = files
    before = onnx_files.load(base).graph.initializers
    changed = certify(base, folded, adapter=file)["changed-set"].data["changed"]
    assert len(changed) == 5
    for name in changed:
        model = onnx_files.load(folded)
        model.graph.initializers[name].const_value = before[name].const_value
        onnx_files.save(model, tmp_path / "task.onnx")
        certificate = certify(base, tmp_path / "task.onnx", adapter=file)
        assert [failed.name for failed in certificate.failures] == ["changed-set"]
        assert repr(name) in certificate["changed-set"].place


def test_the_base_itself_is_no_folded_file(files: tuple[Path, Path, AdapterFile]) -> None:
    base, _, file = files
    failed = [check.name for check in certify(base, base, adapter=file).failures]
    assert failed == ["changed-set", "effect"]


def test_without_the_adapter_what_changed_is_reported(files: tuple[Path, Path, AdapterFile]) -> None:
    base, folded, _ = files
    certificate = certify(base, folded)
    assert certificate.ok
    assert len(certificate["changed"].data["changed"]) == 5
    assert any("not known" in note for note in certificate.notes)


def test_export_catches_a_runtime_that_computes_something_else(
    files: tuple[Path, Path, AdapterFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(Mixed)
    subject = subject_with(model, files[2])
    wrong = replace(subject, injected=subject.base_state)
    with pytest.raises(CertificateError, match="injected model"):
        export(wrong, model, IMAGE, tmp_path / "task.onnx", base=files[0])
    run, calls = certify_parity.run, itertools.count()

    def off_for_the_folded_file(*args: object) -> list[torch.Tensor]:
        return [out * (1 + 1e-4 * (next(calls) % 2)) for out in run(*args)]

    monkeypatch.setattr(certify_parity, "run", off_for_the_folded_file)
    with pytest.raises(CertificateError, match="against the folded model"):
        export(subject, model, IMAGE, tmp_path / "task.onnx", base=files[0])
    assert not list(tmp_path.iterdir())


def test_a_base_file_that_computes_something_else_excuses_nothing(
    files: tuple[Path, Path, AdapterFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(Mixed)
    run = certify_parity.run
    monkeypatch.setattr(certify_parity, "run", lambda *args: [out * 1.5 for out in run(*args)])
    with pytest.raises(CertificateError, match="of the base file against the base model"):
        export(subject_with(model, files[2]), model, IMAGE, tmp_path / "task.onnx", base=files[0])
    with pytest.raises(CertificateError, match="of the base file against the base model"):
        export_onnx(model, tmp_path / "base.onnx", IMAGE)
    assert not list(tmp_path.iterdir())


class _Steep(nn.Module):
    """Float32 loses thousands of roundings in it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(30, 30)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(1e4 * self.linear(x))


def exact_check(
    given: Subject, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch, *, file: Any = None
) -> Check:
    """The check alone, against a runtime that is exact; ``file``: the state that the folded file has."""

    def exact(state: Any, feeds: Any) -> list[torch.Tensor]:
        with state() as held, torch.no_grad():
            return [copy.deepcopy(held).double()(x.double())]

    class Session:
        def __init__(self, state: Any) -> None:
            self.state = state

        def get_inputs(self) -> list[Any]:
            return [SimpleNamespace(name="x", type="tensor(float)", shape=list(x.shape))]

    monkeypatch.setattr(certify_parity, "run", lambda session, feeds: exact(session.state, feeds))
    monkeypatch.setattr(certify_parity, "random_like", lambda inputs, seed: inputs)
    sessions = Session(given.base_state), Session(file or given.folded_state)
    return certify_parity.parity_check(given, ((x,), {}), *sessions, precision=torch.float32, notes=[])


@pytest.mark.parametrize(("gain", "fine"), [(1.0, True), (1.1, False)])
def test_the_injected_model_may_lose_what_its_base_does(
    gain: float, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a runtime that is exact, float32's own rounding is no fault; more than three times it is."""
    model, x = made(_Steep), torch.randn(5, 30)
    plain = subject(model, ("linear.weight",))

    @contextmanager
    def injected() -> Generator[nn.Module]:
        with plain.folded_state() as folded:
            hook = folded.register_forward_hook(lambda _, args, out: out * gain)
            yield folded
            hook.remove()

    check = exact_check(replace(plain, injected=injected), x, monkeypatch)
    assert check.data["example"]["injected"] > certify_errors.INJECTED
    assert check.ok is fine


class _Turning(nn.Module):
    """With larger weights float32 loses more in it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(30, 30)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.linear(x))


def test_the_folded_file_may_lose_what_its_weights_lose_in_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = made(_Turning), torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    large = subject(model, ("linear.weight",), size=100.0)
    data = export(large, model, x, tmp_path / "task.onnx", base=tmp_path / "base.onnx")["parity"].data
    assert data["example"]["folded"] > certify_errors.FACTOR * data["example"]["base"] + 2e-6
    run, calls = certify_parity.run, itertools.count()
    monkeypatch.setattr(
        certify_parity, "run", lambda *args: [out * (1 + 1e-3 * (next(calls) % 2)) for out in run(*args)]
    )
    with pytest.raises(CertificateError, match="against the folded model"):
        export(large, model, x, tmp_path / "wrong.onnx", base=tmp_path / "base.onnx")


class _Branched(nn.Module):
    """What an adapter makes of a layer: a base of one size, and a change that is far larger."""

    def __init__(self, layer: nn.Linear, change: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.layer(x) + x @ self.change.t())


def amplified(wrong: float = 0.0) -> tuple[Subject, torch.Tensor]:
    """A base that loses little, folded to one that loses much; one injected weight may be wrong."""
    model, x = made(_Turning), torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    given = subject(model, ("linear.weight",), size=100.0)
    change = given.changes["linear.weight"]
    added = change.after - change.before
    added[3, 4] *= 1 + wrong

    @contextmanager
    def injected() -> Generator[nn.Module]:
        yield _Branched(model.linear, added)

    return replace(given, injected=injected), x


def test_the_injected_model_may_lose_what_rounding_does_to_the_folded_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the base's own rounding shows nothing of it, and one run of the folded model too little."""
    measured = exact_check(*amplified(), monkeypatch).data["example"]
    assert measured["injected"] > certify_errors.INJECTED + 2e-6
    assert measured["folded"] == 0
    assert exact_check(*amplified(), monkeypatch).ok
    assert measured["apart"] < 1e-3


def test_rounding_of_the_folded_model_excuses_no_weight_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check = exact_check(*amplified(1e-3), monkeypatch)
    assert not check.ok
    assert "against the injected model" in check.detail
    given, x = amplified()

    @contextmanager
    def other() -> Generator[nn.Module]:
        with given.folded_state() as folded, torch.no_grad():
            weight = folded.get_parameter("linear.weight")
            weight[3, 4] *= 1 + 1e-3
            yield folded
            weight[3, 4] /= 1 + 1e-3

    check = exact_check(given, x, monkeypatch, file=other)
    assert not check.ok
    assert "against the folded model" in check.detail


def test_what_rounding_of_the_folded_model_excuses_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify_parity.Noise, "moved", lambda self: [1.0])
    assert exact_check(*amplified(), monkeypatch).data["example"]["apart"] == pytest.approx(3e-3)


def test_a_file_that_the_runtime_refuses_is_a_finding(
    files: tuple[Path, Path, AdapterFile], tmp_path: Path
) -> None:
    base, folded, file = files
    model = onnx_files.load(folded)
    find(model, "Relu").op_type = "NoSuchOperator"
    onnx_files.save(model, tmp_path / "task.onnx")
    certificate = certify(base, tmp_path / "task.onnx", adapter=file)
    assert [check.name for check in certificate.failures] == ["structure", "runtime-structure"]


def test_distance_sees_zeroed_swapped_and_odd_outputs() -> None:
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    assert distance([a, b], [a, b]) == 0
    assert distance([torch.zeros(3, 4), b], [a, b]) == pytest.approx(1)
    assert distance([b, a], [a, b]) > 0.1
    assert distance([a], [a, b]) == float("inf")
    assert distance([a[:2]], [a]) == float("inf")
    odd = a.clone()
    odd[0, 0] = float("nan")
    assert distance([odd], [a]) == float("inf")
    assert distance([odd], [odd]) == 0
    assert distance([torch.tensor([1, 2])], [torch.tensor([1, 3])]) == 0.5


def test_ulps_counts_neighbouring_floats() -> None:
    one = torch.ones(2)
    above = torch.nextafter(one, one * 2)
    assert ulps(one, one, one) == 0
    assert ulps(above, one, one) == 1
    assert ulps(one * float("nan"), one, one) == float("inf")
    assert ulps(torch.zeros(2), one, one) > 1e6
    # A small result of a large base may be off by the base's own rounding.
    assert ulps(torch.tensor([1e-6]), torch.tensor([1.01e-6]), torch.tensor([1.0])) < 1


def test_an_empty_certificate_proves_nothing() -> None:
    empty = Certificate("a", "b", ())
    assert not empty.ok
    with pytest.raises(CertificateError, match="with checks"):
        empty.raise_for_failure()
    with pytest.raises(CertificateError, match="version 1"):
        Certificate.from_json("{}")
    failing = Certificate("a", "b", (Check("delta", ok=False, detail="x [y]", place="w"),))
    assert "x [y]" in str(failing)
    with pytest.raises(KeyError):
        _ = failing["structure"]


class Chaotic(nn.Module):
    """A matrix, and a map that doubles every rounding so many times."""

    def __init__(self, times: int = 40) -> None:
        super().__init__()
        self.matrix, self.times = nn.Linear(4, 4), times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sigmoid(self.matrix(x))
        for _ in range(self.times):
            y = 3.9 * y * (1 - y)
        return y


@pytest.mark.parametrize(("times", "noted"), [(40, True), (1, False)])
def test_a_parity_that_compares_no_digit_says_so(times: int, noted: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Chaotic(times).eval(), torch.randn(2, 4)
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x, seed=0)
    for parameter in lora_fx.parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    certificate = export_onnx(model, tmp_path / "task.onnx", x)
    assert certificate.ok
    assert any("parity compares no digit" in note for note in certificate.notes) is noted


class Lowest(nn.Module):
    """Masks with the lowest number of the scores' dtype, in float32: float64's makes every output NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.linear(x))
        allowed = torch.ones(6, dtype=torch.float32)
        return self.out(hidden + (1.0 - allowed) * torch.finfo(hidden.dtype).min)


class Dtyped(Lowest):
    """Computes something else, and finite, in float64."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.linear(x))) * (2.0 if x.dtype is torch.float64 else 1.0)


class Choosing(Lowest):
    """Chooses rows by scores that are equal but for their rounding; what they are chosen from is tame."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = self.out(torch.tanh(self.linear(x)))
        scores = rows.sum(-1) * 3e-7 - 4.6
        chosen = scores.topk(5, dim=1).indices.unsqueeze(-1).expand(-1, -1, 4)
        return {"rows": rows, "chosen": rows.gather(1, chosen)}


class Joined(Choosing):
    """The same, all of it in one tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.cat(list(super().forward(x).values()), 1)


ROWS = torch.randn(2, 60, 6, generator=torch.Generator().manual_seed(4))


def parity_of(model: nn.Module, folder: Path, factor: float = 1.0) -> tuple[Check, list[str]]:
    """The check alone, on a folded file in which one matrix is multiplied by a factor."""
    base, folded, _ = export_pair(model, ("linear.weight", "out.weight"), ROWS, folder)
    file = onnx_files.load(folded)
    put(weight_of(file, "MatMul", 0), held(weight_of(file, "MatMul", 0)) * factor)
    onnx_files.save(file, folder / "other.onnx")
    sessions = [
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for path in (base, folder / "other.onnx")
    ]
    notes: list[str] = []
    given = subject(model, ("linear.weight", "out.weight"))
    check = certify_parity.parity_check(given, ((ROWS,), {}), *sessions, precision=torch.float32, notes=notes)
    return check, notes


@pytest.mark.parametrize("build", [Lowest, Dtyped])
def test_where_float64_is_no_reference_the_model_in_its_own_dtype_is(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = made(build)
    check, notes = parity_of(model, tmp_path)
    assert check.ok
    assert {measured["output"] for measured in check.data.values()} == {"output"}
    assert all(measured["folded"] < 2e-6 for measured in check.data.values())
    assert "float64 is no reference for output" in check.detail
    assert not any("no digit" in note for note in notes)
    check, _ = parity_of(model, tmp_path, 1 + 1e-3)
    assert not check.ok
    assert "against the folded model" in check.detail
    assert "in the model's own dtype" in check.place


@pytest.mark.parametrize("build", [Lowest, Dtyped])
def test_where_float64_is_no_reference_a_wrong_base_excuses_nothing(
    build: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = certify_parity.run
    monkeypatch.setattr(certify_parity, "run", lambda *args: [out * 1.5 for out in run(*args)])
    with pytest.raises(CertificateError, match=r"error 0\.5 of the base file against the base model"):
        export_onnx(made(build), tmp_path / "base.onnx", ROWS)


def test_only_the_outputs_that_are_chosen_by_rounding_compare_no_digit(tmp_path: Path) -> None:
    model = made(Choosing)
    check, notes = parity_of(model, tmp_path)
    assert check.ok
    assert any("parity compares no digit of chosen: " in note for note in notes)
    check, _ = parity_of(model, tmp_path, 1 + 1e-3)
    assert not check.ok
    assert check.place == "example inputs"
    assert check.data["example"]["folded"] > 1e-4


def test_rows_that_rounding_leaves_alone_are_compared_beside_others_that_it_chooses(tmp_path: Path) -> None:
    """Before, those that are chosen excused a fault of the whole tensor."""
    model = made(Joined)
    check, notes = parity_of(model, tmp_path)
    assert check.ok
    assert any(
        "no digit here but in output (92% of it, which rounding leaves alone)" in note for note in notes
    )
    steady = [measured for measured in check.data.values() if measured["steady"] is not None]
    assert len(steady) == 2
    assert all(measured["folded"] < 2e-6 for measured in steady)
    check, _ = parity_of(model, tmp_path, 1 + 1e-3)
    assert not check.ok
    assert "against the folded model" in check.detail
    assert "which rounding leaves alone" in check.place


def test_noise_moves_by_a_rounding_what_is_no_whole_number() -> None:
    x, kept = torch.rand(1000), torch.zeros(4)
    before = x.clone()
    with RoundingNoise(0):
        moved, again = x * 1.1, x * 1.1
        whole = torch.arange(8.0) * 2 - 5
        kept.add_(0.1)
        view = x.view(10, 100)
    gap = (moved - x * 1.1).abs() / (x * 1.1)
    assert 0 < float(gap.max()) <= 2 * torch.finfo(torch.float32).eps
    assert not torch.equal(moved, again)
    assert torch.equal(whole, torch.arange(8.0) * 2 - 5)
    assert torch.equal(kept, torch.full((4,), 0.1))
    assert torch.equal(x, before)
    assert view.data_ptr() == x.data_ptr()
