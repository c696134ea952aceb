"""Bad input gets a named error that says what to do, and leaves model and files untouched."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import safetensors
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import nn

import lora_fx
from lora_fx import Policy, Rule
from lora_fx.fingerprints import checksum
from lora_fx.passes import managed
from tests.by_hand import randomise

X = torch.randn(3, 6)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


class _Untouched:
    """Asserts that a model is bit for bit what it was."""

    def __init__(self, subject: nn.Module) -> None:
        self.subject = subject
        self.before = self._state()

    def _state(self) -> Any:
        parameters = {
            n: (id(p), p.requires_grad, p.detach().clone()) for n, p in self.subject.named_parameters()
        }
        modules = {n: (type(m), m.training, sorted(m.__dict__)) for n, m in self.subject.named_modules()}
        return parameters, modules

    def check(self) -> None:
        (before, modules_before), (after, modules_after) = self.before, self._state()
        assert modules_before == modules_after
        assert list(before) == list(after)
        for name, (identity, flag, value) in before.items():
            assert (identity, flag) == after[name][:2]
            assert torch.equal(value, after[name][2])


def test_untouched_notices_a_change() -> None:
    subject = model()
    watch = _Untouched(subject)
    subject[0].weight.data[0, 0] += 1
    with pytest.raises(AssertionError):
        watch.check()


BAD_CALLS: dict[str, tuple[type[Exception], Callable[[nn.Module], Any]]] = {
    "inputs of another shape": (lora_fx.InputError, lambda m: lora_fx.inject(m, Policy(Rule()), X[:, :5])),
    "inputs of no form": (lora_fx.InputError, lambda m: lora_fx.trace(m, 3)),
    "nothing matches": (lora_fx.PolicyError, lambda m: lora_fx.inject(m, Policy(Rule(name="nope.*")), X)),
    "a role without a trace": (lora_fx.PolicyError, lambda m: lora_fx.inject(m, Policy(Rule(role="q")))),
    "a depth without a trace": (lora_fx.PolicyError, lambda m: lora_fx.plan(m, Policy(Rule(depth=-1)))),
    "an unknown role": (lora_fx.PolicyError, lambda m: lora_fx.inject(m, Policy(Rule(role="nope")), X)),
    "rank 0": (lora_fx.PolicyError, lambda m: lora_fx.inject(m, Policy(Rule(rank=0)), X)),
    "rank 1.5": (lora_fx.PolicyError, lambda m: lora_fx.inject(m, Policy(Rule(rank=1.5)), X)),
    "no rules": (lora_fx.PolicyError, lambda m: lora_fx.inject(m, Policy(), X)),
    "a rule for a policy": (lora_fx.PolicyError, lambda m: lora_fx.inject(m, Rule(rank=2), X)),
    "a dict for a policy": (lora_fx.PolicyError, lambda m: lora_fx.plan(m, {"r": 8}, X)),
    "no adapters to switch": (lora_fx.AdapterNameError, lambda m: lora_fx.set_adapter(m, "default")),
    "no adapters to unload": (lora_fx.AdapterNameError, lora_fx.unload),
    "no adapters to fold": (lora_fx.AdapterNameError, lora_fx.fold),
    "an unusable name": (
        lora_fx.AdapterNameError,
        lambda m: lora_fx.inject(m, Policy(Rule()), X, adapter="a.b"),
    ),
    "no model": (lora_fx.LoraFxError, lambda m: lora_fx.inject(3, Policy(Rule()), X)),
    "no such file": (lora_fx.AdapterFileError, lambda m: lora_fx.load_adapter(m, "nowhere.safetensors")),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_raise_and_leave_the_model(case: str) -> None:
    subject = model()
    watch = _Untouched(subject)
    error, call = BAD_CALLS[case]
    with pytest.raises(error) as caught:
        call(subject)
    assert isinstance(caught.value, lora_fx.LoraFxError)
    assert caught.value.advice
    watch.check()


def test_a_rule_alone_is_to_be_wrapped_in_a_policy() -> None:
    with pytest.raises(lora_fx.PolicyError, match=r"got Rule\(rank=2\)\. Wrap rules in Policy"):
        lora_fx.inject(model(), Rule(rank=2), X)


@pytest.mark.parametrize("call", [lora_fx.plan, lora_fx.inject])
def test_a_layer_of_peft_is_refused(call: Callable[..., Any]) -> None:
    theirs = type("Linear", (nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    subject = nn.Sequential(nn.Linear(6, 6), theirs(6, 4))
    watch = _Untouched(subject)
    with pytest.raises(lora_fx.WrappedModelError, match=r"1: .*peft's Linear.*merge_and_unload"):
        call(subject, Policy(Rule(rank=2)), X)
    watch.check()


def test_two_adapters_at_once_are_refused() -> None:
    subject = lora_fx.inject(model(), Policy(Rule(rank=2)), X)
    lora_fx.inject(subject, Policy(Rule(rank=1)), X, adapter="second")
    with pytest.raises(lora_fx.AdapterNameError, match="of one only"):
        lora_fx.set_adapter(subject, ["default", "second"])


def test_a_folder_that_is_missing_is_made_and_one_in_the_files_place_is_refused(tmp_path: Path) -> None:
    subject = lora_fx.inject(model(), Policy(Rule(rank=2)), X)
    lora_fx.save_adapter(subject, tmp_path / "no" / "dir" / "a.safetensors")
    assert isinstance(lora_fx.load_adapter(model(), tmp_path / "no" / "dir" / "a.safetensors"), nn.Module)
    with pytest.raises(lora_fx.AdapterFileError, match="got a folder"):
        lora_fx.save_adapter(subject, tmp_path / "no")
    with pytest.raises(lora_fx.PlanError, match="got a folder"):
        lora_fx.plan(model(), Policy(Rule(rank=2)), X).save(tmp_path / "no")


def test_nearest_candidates_are_named() -> None:
    with pytest.raises(lora_fx.PolicyError, match=r"0\.weight"):
        lora_fx.plan(model(), Policy(Rule(name="0.wieght")), X)


def test_the_same_name_twice() -> None:
    subject = lora_fx.inject(model(), Policy(Rule(rank=2)), X)
    before = copy.deepcopy(subject.state_dict())
    with pytest.raises(lora_fx.AdapterNameError, match="default"):
        lora_fx.inject(subject, Policy(Rule(rank=2)), X)
    assert all(torch.equal(before[k], v) for k, v in subject.state_dict().items())


def test_another_base(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lora_fx.save_adapter(lora_fx.inject(model(0), Policy(Rule(rank=2)), X), path)
    other = model(1)
    watch = _Untouched(other)
    with pytest.raises(lora_fx.BaseMismatchError, match="other values"):
        lora_fx.load_adapter(other, path)
    watch.check()
    with pytest.raises(lora_fx.AdapterFileError, match="'exact', 'values', 'shape'; got 'shapes'"):
        lora_fx.load_adapter(other, path, base_check="shapes")
    watch.check()
    lora_fx.load_adapter(other, path, base_check="shape")


def test_values_check_takes_the_base_in_another_precision(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    half = model(0).bfloat16()
    lora_fx.save_adapter(lora_fx.inject(half, Policy(Rule(rank=2)), X.bfloat16()), path)
    with pytest.raises(lora_fx.BaseMismatchError, match="dtype"):
        lora_fx.load_adapter(model(0), path)
    lora_fx.load_adapter(model(0), path, base_check="values")
    with pytest.raises(lora_fx.BaseMismatchError, match="other values"):
        lora_fx.load_adapter(model(1), path, base_check="values")


def test_one_flipped_bit_of_the_data_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lora_fx.save_adapter(lora_fx.inject(model(), Policy(Rule(rank=2)), X), path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(data)
    subject = model()
    watch = _Untouched(subject)
    with pytest.raises(lora_fx.AdapterFileError, match=r"a\.safetensors.*differ from the file's checksum"):
        lora_fx.load_adapter(subject, path)
    watch.check()


@pytest.mark.parametrize("key", ["plan", "fingerprints", "deltas", "checksum"])
def test_a_changed_header_is_noticed(key: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lora_fx.save_adapter(lora_fx.inject(model(), Policy(Rule(rank=2, alpha=2)), X), path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if key == "checksum":
        # Other tensors with a checksum that fits them, under the header of these.
        tensors["0.weight/B"] += 1
        metadata["checksum"] = checksum(tensors)
    else:
        texts = {"plan": ('"scale": 1.0', '"scale": 2.0'), "fingerprints": ("float32", "float64")}
        old, new = texts.get(key, ("0.0", "0.5"))
        assert old in metadata[key]
        metadata[key] = metadata[key].replace(old, new)
    save_file(tensors, path, metadata)
    subject = model()
    watch = _Untouched(subject)
    with pytest.raises(lora_fx.AdapterFileError, match=r"a\.safetensors.*plan or fingerprints that differ"):
        lora_fx.load_adapter(subject, path)
    watch.check()
    # A note that another program added is none of ours.
    lora_fx.save_adapter(lora_fx.inject(subject, Policy(Rule(rank=2)), X), path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata | {"author": "somebody"})
    assert lora_fx.load_adapter(model(), path)[0].weight.shape == (8, 6)


def test_a_file_without_a_checksum_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lora_fx.save_adapter(lora_fx.inject(model(), Policy(Rule(rank=2)), X), path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    # The version before wrote one of the tensors alone, the one before that none.
    for name in ("header_checksum", "checksum"):
        assert len(metadata.pop(name)) == 64
        save_file(tensors, path, metadata)
        assert lora_fx.load_adapter(model(), path)[0].weight.shape == (8, 6)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_damaged_file(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.safetensors"
    lora_fx.save_adapter(lora_fx.inject(model(), Policy(Rule(rank=2)), X), path)
    path.write_bytes(path.read_bytes()[:cut])
    subject = model()
    watch = _Untouched(subject)
    with pytest.raises(lora_fx.AdapterFileError, match=r"a\.safetensors"):
        lora_fx.load_adapter(subject, path)
    watch.check()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_at_fold(value: float) -> None:
    subject = lora_fx.inject(model(), Policy(Rule(rank=2)), X)
    lora_fx.parameters(subject)[0].data[0, 0] = value
    names = list(subject.state_dict())
    with pytest.raises(lora_fx.AdapterValueError, match="weight"):
        lora_fx.fold(subject)
    with pytest.raises(lora_fx.AdapterValueError), lora_fx.folded(subject):
        pass
    assert list(subject.state_dict()) == names
    assert type(subject[0]).__mro__[1] is nn.Linear


def test_wrapped_models_are_refused() -> None:
    wrapped = nn.DataParallel(model())
    watch = _Untouched(wrapped)
    with pytest.raises(lora_fx.WrappedModelError, match="Inject first"):
        lora_fx.inject(wrapped, Policy(Rule(rank=2)), X)
    watch.check()


class _CachedView(nn.Module):
    """Keeps a view of its weight from __init__: no property can reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.cached = self.linear.weight.data.t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + x @ self.cached


def test_the_probe_refuses_a_weight_that_is_read_past_its_module() -> None:
    subject = _CachedView()
    watch = _Untouched(subject)
    with pytest.raises(lora_fx.ProbeError, match=r"linear\.weight"):
        lora_fx.inject(subject, Policy(Rule(rank=2)), X)
    watch.check()


@pytest.mark.parametrize("compiled", [torch.jit.script, lambda m: torch.jit.trace(m, X)])
def test_compiled_submodules_are_left_alone(compiled: Callable[[nn.Module], nn.Module]) -> None:
    inner = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).eval()
    subject = nn.Sequential(nn.Linear(6, 6), compiled(inner), nn.Linear(6, 2)).eval()
    watch, wanted = _Untouched(subject), subject(X)
    lora_fx.inject(subject, Policy(Rule(rank=2), bias="all", norm_stats="train"), X)
    assert torch.equal(subject(X), wanted)
    assert [r.reason for r in lora_fx.audit(subject).rows if r.name == "1.0.weight"] == ["unfit"]
    assert lora_fx.verify(subject, X).ok
    lora_fx.unload(subject)
    watch.check()
    with pytest.raises(lora_fx.PlanError, match=r"1\.0\.weight is held by .* TorchScript compiled"):
        lora_fx.inject(subject, Policy(lora_fx.Train(name="1.0.weight")), X)
    watch.check()


@pytest.mark.parametrize("step", ["_ties", "_rewrite", "apply_trainability", "remember_norms"])
def test_any_failure_inside_insert_leaves_the_model_as_it_was(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(step)

    subject = model()
    watch = _Untouched(subject)
    monkeypatch.setattr(f"lora_fx.passes.insert.{step}", fail)
    with pytest.raises(OSError, match=step):
        lora_fx.inject(subject, Policy(Rule(rank=2)), X)
    watch.check()


class _Asking(nn.Module):
    """Asks a question of its module, and takes another branch where the answer is no."""

    def __init__(self, asked: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.asked = asked

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x).tanh()
        return y * 3 if self.asked(self.inner) else y


@pytest.mark.parametrize(
    "asked",
    [
        lambda m: type(m[0]) is nn.Linear,
        lambda m: type(m[0]).forward is nn.Linear.forward,
        lambda m: type(m[1]) is nn.BatchNorm1d,
        lambda m: len(list(m[0].parameters())) == 2,
    ],
)
def test_the_probe_refuses_a_forward_that_asks_for_its_modules_class(
    asked: Callable[[nn.Module], bool],
) -> None:
    subject = _Asking(asked).eval()
    watch = _Untouched(subject)
    with pytest.raises(lora_fx.ProbeError, match=r"_Asking.*asks for its modules' class or parameters"):
        lora_fx.inject(subject, Policy(Rule(rank=2)), X)
    watch.check()


class _Returning(nn.Module):
    """Returns its weight beside its result, as a codebook is."""

    def __init__(self, returned: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.returned = returned

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(x), self.returned(self.linear.weight)


@pytest.mark.parametrize("returned", [lambda w: w, lambda w: w[:1], lambda w: w.detach()])
def test_a_model_may_return_its_weight(returned: Callable[[torch.Tensor], torch.Tensor]) -> None:
    subject = lora_fx.inject(_Returning(returned), Policy(Rule(rank=2)), X)
    assert len(lora_fx.parameters(subject)) == 2
    assert lora_fx.verify(subject, X).ok


class _NoBackward(torch.autograd.Function):
    """Computes, and has no backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        del ctx
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError("there is no way back")


class _Failing(nn.Module):
    """Fails with adapters: in its backward, or where it takes its layer's two parameters by position."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "backward":
            return _NoBackward.apply(self.linear(x))
        weight, bias = self.linear.parameters()
        return nn.functional.linear(x, weight, bias)


@pytest.mark.parametrize(("way", "said"), [("backward", "no way back"), ("forward", "too many values")])
def test_a_forward_or_backward_that_fails_with_adapters_is_named(way: str, said: str) -> None:
    subject = _Failing(way)
    watch = _Untouched(subject)
    with pytest.raises(lora_fx.ProbeError, match=f"_Failing.*{said}"):
        lora_fx.inject(subject, Policy(Rule(rank=2)), X)
    watch.check()


class _Leaping(nn.Module):
    """Answers a rounding of its layer's result with another output, as a choice between equals does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(1e5 * self.inner(x))


def test_the_probe_tells_a_leap_at_a_rounding_from_a_fault() -> None:
    torch.manual_seed(0)
    policy = Policy(Rule(rank=2, init="olora"))  # its branch adds up in another order than its weight
    leaping = lora_fx.inject(_Leaping(nn.Linear(6, 40)), policy, X)
    assert len(lora_fx.parameters(leaping)) == 2
    with pytest.raises(lora_fx.ProbeError, match=r"linear\.weight"):
        lora_fx.inject(_Leaping(_CachedView()), Policy(Rule(rank=2)), X)


class _NoEffect(nn.Module):
    """The second layer's result is multiplied by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + 0 * self.second(x)


def test_an_adapter_without_a_gradient_is_warned_of_where_the_weight_has_none_either() -> None:
    subject = _NoEffect()
    with pytest.warns(UserWarning, match=r"no gradient .*second\.weight"):
        lora_fx.inject(subject, Policy(Rule(rank=2)), X)
    assert all("second" not in c.what for c in lora_fx.verify(subject, X).failures)


class _Chosen(nn.Module):
    """A layer whose result only chooses rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.chooser = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x).gather(-1, self.chooser(x).topk(3).indices)


def test_what_only_chooses_is_not_adapted_and_the_plan_says_why() -> None:
    decision = lora_fx.plan(_Chosen(), Policy(Rule(rank=2)), X)["chooser.weight"]
    assert (decision.action, decision.reason) == ("skip", "no-effect")
    assert "indices" in decision.detail
    lora_fx.inject(_Chosen(), Policy(Rule(rank=2)), X)


def test_a_delta_that_half_precision_rounds_away_is_refused_and_a_lossy_one_warned_of() -> None:
    def injected(size: float) -> nn.Module:
        subject = lora_fx.inject(model().bfloat16(), Policy(Rule(rank=2)), X.bfloat16(), seed=0)
        for parameter in lora_fx.parameters(subject):
            parameter.data.fill_(size)
        return subject

    watch = _Untouched(subject := injected(1e-3))
    with pytest.raises(lora_fx.AdapterValueError, match="bfloat16"):
        lora_fx.fold(subject)
    watch.check()
    with pytest.warns(UserWarning, match="folding keeps"):
        lora_fx.fold(subject, min_retained=0)
    with pytest.warns(UserWarning, match="folding keeps"):
        lora_fx.fold(injected(0.05))


@pytest.mark.parametrize(("got", "said"), [("two", "two. Pass"), ("no!", "no! Pass"), ("why?", "why? Pass")])
def test_a_sentence_ends_once(got: str, said: str) -> None:
    error = lora_fx.LoraFxError("it", expected="one", got=got, advice="Pass one.")
    assert str(error) == f"it: expected one; got {said} one."
    assert error.got == got


def test_warnings_point_at_the_line_that_called() -> None:
    lossy = lora_fx.inject(model().bfloat16(), Policy(Rule(rank=1)), X.bfloat16())
    for parameter in lora_fx.parameters(lossy):
        nn.init.constant_(parameter, 1e-2)
    calls: dict[str, Callable[[], Any]] = {
        "no room for 1": lambda: lora_fx.plan(model(), Policy(Rule(rank=8), budget=20), X),
        "for 1 of 2": lambda: lora_fx.inject(model(), Policy(Rule(rank=8), budget=20), X),
        "folding keeps": lambda: lora_fx.fold(lossy, min_retained=0),
    }
    for text, call in calls.items():
        with pytest.warns(UserWarning, match=text) as warned:
            call()
        assert {(w.filename, w.lineno) for w in warned} == {(__file__, call.__code__.co_firstlineno)}


def test_what_is_not_there_is_a_named_error_and_a_file_not_found(tmp_path: Path) -> None:
    base, adapter, folded = (tmp_path / name for name in ("base.onnx", "a.safetensors", "folded.onnx"))
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [out])
    for path in (base, folded):
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    lora_fx.save_adapter(lora_fx.inject(model(), Policy(Rule(rank=2)), X), adapter)
    none = tmp_path / "none.onnx"
    calls: list[Callable[[Path], Any]] = [
        lambda path: lora_fx.fold_onnx(path, adapter, tmp_path / "x.onnx"),
        lambda path: lora_fx.fold_onnx(base, path, tmp_path / "x.onnx"),
        lambda path: lora_fx.certify(path, folded),
        lambda path: lora_fx.certify(base, path),
        lambda path: lora_fx.certify(base, folded, adapter=path),
        lora_fx.session,
        lambda path: lora_fx.session(base, adapter=path),
        lambda path: lora_fx.compare_latency(path, base, seconds=0.1),
        lambda path: lora_fx.compare_latency(base, path, seconds=0.1),
        lora_fx.audit,
        lambda path: lora_fx.load_adapter(model(), path),
        lambda path: lora_fx.fold_checkpoint(path, adapter, tmp_path / "x"),
        lambda path: lora_fx.fold_checkpoint(adapter, path, tmp_path / "x"),
        lora_fx.Plan.load,
    ]
    for number, call in enumerate(calls):
        with pytest.raises(lora_fx.LoraFxError, match=r"none\.onnx: expected .*; got no such file") as said:
            call(none)
        assert isinstance(said.value, FileNotFoundError), number
        assert "Errno" not in str(said.value)
        again = pickle.loads(pickle.dumps(said.value))
        assert (type(again), str(again)) == (type(said.value), str(said.value))
    nothing = lora_fx.AdapterFile(lora_fx.Plan(()), {}, {})
    for call in (*calls[:9], lambda path: lora_fx.fold_onnx(base, nothing, path)):
        with pytest.raises(lora_fx.LoraFxError, match="a folder"):
            call(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*")) == ["a.safetensors", "base.onnx", "folded.onnx"]


@pytest.mark.parametrize("call", [lora_fx.fold, lora_fx.unload])
def test_a_sharding_of_another_make_is_refused_before_anything_is_changed(
    call: Callable[[nn.Module], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sharding:
        def _get_fsdp_state(self) -> Any:
            return object()

    subject = lora_fx.inject(model(), Policy(Rule(rank=2)), X)
    watch = _Untouched(subject)
    monkeypatch.setattr(managed, "sharding_modules", lambda model: [Sharding()])
    with pytest.raises(lora_fx.WrappedModelError, match="_fsdp_param_groups"):
        call(subject)
    watch.check()
    assert lora_fx.parameters(subject)


def test_a_plan_that_trains_nothing_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="adapts and trains nothing"):
        subject = lora_fx.inject(model(), Policy(lora_fx.Skip(name="*")), X)
    assert not lora_fx.parameters(subject)


def test_saving_warns_of_a_base_that_can_be_trained(tmp_path: Path) -> None:
    subject = lora_fx.inject(model(0), Policy(Rule(rank=2)), X)
    with pytest.warns(UserWarning, match=r"'default' changes no weight: .* for all \d+.*lora_fx\.parameters"):
        lora_fx.save_adapter(subject, tmp_path / "a.safetensors")
    randomise(subject)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_fx.save_adapter(subject, tmp_path / "a.safetensors")
    subject.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"0\.weight and \d+ more"):
        lora_fx.save_adapter(subject, tmp_path / "a.safetensors")
