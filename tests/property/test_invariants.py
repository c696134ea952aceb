"""The invariants of the design on drawn models under drawn policies.

CI draws 8 x 65 models, and exports one for every twenty of them.
More by ``make test PYTEST_ARGS="--hypothesis-profile=long tests/property"``.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, event, given, note, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_fx
from lora_fx.passes.fold import base_only
from tests.property import checks
from tests.property.building import build, policy_of
from tests.property.specs import FAMILIES, Family, models, policies


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_every_invariant(family: Family, data: st.DataObject) -> None:
    spec, asked = data.draw(models(family)), data.draw(policies())
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    model, x = build(spec, dtype)
    before = checks.Snapshot.of(model)
    policy = policy_of(asked, model)
    plain = copy.deepcopy(model)
    try:
        plan = lora_fx.plan(model, policy, x)
    except lora_fx.PolicyError as error:
        # A policy whose first rule skips the model's only weight is refused, and rightly.
        assert error.expected == "at least one weight that is trained"  # noqa: PT017
        event("nothing to adapt")
        return
    note(str(plan))
    assert all(decision.expected and decision.expected_reason for decision in plan.adapted)
    assert asked.compute != "weight" or {d.form for d in plan.adapted} <= {"weight"}
    if not plan.adapted and not plan.trained:
        event("nothing to adapt")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        lora_fx.inject(model, plan, x, seed=spec.seed)
    check_start(model, plain, plan, x)
    checks.assert_base_kept(before, model.state_dict())
    checks.assert_only_adapters_learn(model, x)
    randomise(model, x, spec.seed)
    check_modes(model, x)
    check_copy(model, x)
    check_file(model, plain, x)
    if data.draw(st.integers(0, 3)) == 0:
        lora_fx.verify(model, x).raise_for_failure()
    checks.assert_base_kept(before, model.state_dict())
    lora_fx.unload(model)
    checks.assert_restored(before, model)


def trained_alone(model: nn.Module, *names: str) -> nn.Module:
    """Torch picks kernels by requires_grad: hold it equal on both sides of a comparison of bits."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name in names)
    return model


def check_start(model: nn.Module, plain: nn.Module, plan: lora_fx.Plan, x: Tensor) -> None:
    """At its start the injected model computes what the base computes, bit for bit."""
    in_full = [name for d in plan.trained for name in (d.name, *d.site.names)]
    base = trained_alone(copy.deepcopy(plain), *in_full, *(e.name for e in plan.extras))
    checks.assert_same_bits(checks.run(model, x), checks.run(base, x))
    with lora_fx.disable_adapter(model):
        checks.assert_same_bits(checks.run(model, x), checks.run(trained_alone(base), x))


def randomise(model: nn.Module, x: Tensor, seed: int) -> None:
    """Fill the adapters with random values, larger ones until the output shows them.

    A network may damp what its first layers change below what a comparison with the base would see.
    """
    generator = torch.Generator().manual_seed(seed)
    with lora_fx.disable_adapter(model):
        base = checks.run(model, x)
    for size in (0.1, 0.2, 0.4):
        with torch.no_grad():
            for parameter in lora_fx.parameters(model):
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
        if checks.distance(checks.run(model, x), base) > checks.SEEN:
            return


def check_modes(model: nn.Module, x: Tensor) -> None:
    """Injected and folded agree in eval and in train, and neither is the base."""
    for mode in (True, False):
        model.train(mode)
        found = checks.run(model, x)
        with lora_fx.folded(model):
            wanted = checks.run(model, x)
        checks.assert_close(found, wanted)
    with lora_fx.disable_adapter(model):
        checks.assert_differs(found, checks.run(model, x))


def check_copy(model: nn.Module, x: Tensor) -> None:
    """A deep copy computes the same, and shares nothing."""
    wanted = checks.run(model, x)
    other = copy.deepcopy(model)
    checks.assert_same_bits(checks.run(other, x), wanted)
    shared = {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}
    assert not shared
    lora_fx.unload(other)
    checks.assert_same_bits(checks.run(model, x), wanted)


def check_file(model: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """What a file brings to another copy of the base computes what was saved."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        lora_fx.save_adapter(model, path)
        lora_fx.load_adapter(plain, path, trainable=True)
        check_checkpoint(plain, path)
    checks.assert_same_bits(checks.run(plain, x), checks.run(model, x))


def check_checkpoint(model: nn.Module, adapter: Path) -> None:
    """What a file makes of the base's checkpoint on disk is what folding makes of the model."""
    base, out = adapter.parent / "base.safetensors", adapter.parent / "folded.safetensors"
    other = copy.deepcopy(model)
    with base_only(other):
        save_file({name: tensor.clone() for name, tensor in other.state_dict().items()}, base)
    lora_fx.fold_checkpoint(base, adapter, out)
    found, wanted = load_file(out), lora_fx.fold(other).state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        checks.assert_same_bits(found[name], tensor)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=max(1, settings.default.max_examples // 20), phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_certificate(family: Family, data: st.DataObject) -> None:
    """What a drawn model exports to is certified, and onnxruntime computes what the model does."""
    spec, asked = data.draw(models(family)), data.draw(policies())
    model, x = build(spec, torch.float32)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            lora_fx.inject(model, policy_of(asked, model), x, seed=spec.seed)
    except lora_fx.PolicyError as error:
        assert error.expected == "at least one weight that is trained"  # noqa: PT017
        event("nothing to adapt")
        return
    note(str(lora_fx.audit(model)))
    randomise(model, x, spec.seed)
    wanted = checks.run(model, x)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            lora_fx.export_onnx(model, path, x).raise_for_failure()
        except lora_fx.ExportError:
            # Only what torch's exporter cannot do with the base alone may be refused.
            with pytest.raises(Exception, match=r"onnx|pass|export"):
                torch.onnx.export(build(spec, torch.float32)[0], (x,), path, dynamo=True)
            event("torch.onnx.export fails on the base")
            return
        session = lora_fx.session(path, providers=["CPUExecutionProvider"])
        (given_name,) = [each.name for each in session.get_inputs()]
        found = torch.from_numpy(session.run(None, {given_name: x.numpy()})[0])
    checks.assert_close(found, wanted, tolerance=1e-4)
