"""Everything the zoo asks of one model, stage by stage; a stage that fails is written down with its cause."""

from __future__ import annotations

import copy
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.passes.preserve import preserved
from lora_fx.passes.rounding import weights_rounded
from lora_fx.passes.slopes import float_leaves, uneven
from tests.zoo.catalogue import Built, build

EVERYTHING = lora_fx.Policy(lora_fx.Rule(rank=2))
TOLERANCE = 1e-5
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}
ROUNDINGS = 10.0
"""So many times what one rounding of every weight does to the base, the two may differ in float64."""
STAGES = ("build", "trace", "plan", "inject", "fold", "step", "roundtrip", "verify")
Row = dict[str, Any]


def measure(name: str, *, tell: Callable[[Row], None] = lambda row: None) -> Row:
    """Return one row of the table; ``tell`` hears the row after every stage, in case the next one hangs."""
    row: Row = {"name": name, "seconds": {}, "failed": {}}
    subject = Subject(row, tell)
    built: Built | None = subject.stage("build", lambda: build(name))
    if built is None:
        return row
    model, inputs = built
    if not any(bool(o.isfinite().any()) for o in outputs_of(model, inputs)):
        row["failed"]["build"] = "the base itself returns no finite number on these inputs"
        tell(row)
        return row
    row["class"], row["parameters"] = type(model).__name__, sum(p.numel() for p in model.parameters())
    _facts(model, inputs, subject)
    if subject.stage("inject", lambda: _inject(model, inputs, row)) is None:
        return row
    subject.stage("fold", lambda: _fold(model, inputs, row))
    subject.stage("step", lambda: _step(model, inputs))
    subject.stage("roundtrip", lambda: _roundtrip(model, inputs))
    subject.stage("verify", lambda: _verify(model, inputs, row))
    return row


class Subject:
    """A row in the making: what is told after each stage, and what failed."""

    def __init__(self, row: Row, tell: Callable[[Row], None]) -> None:
        self.row, self.tell = row, tell

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        """Run one stage; return its result (True for None), or None where it failed."""
        self.tell({**self.row, "failed": {**self.row["failed"], name: "did not end"}})
        started = time.perf_counter()
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - the table's rows are for failures too
            self.row["failed"][name] = cause(error)
            result = None
        else:
            result = True if result is None else result
        self.row["seconds"][name] = round(time.perf_counter() - started, 3)
        self.tell(self.row)
        return result


def cause(error: BaseException) -> str:
    """Return an error as one line: its type, its text, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[-3:])
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]} [{where}]"


def outputs_of(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Run the model from one random state, leaving its buffers as they were; return its float tensors."""
    with preserved(model):
        torch.manual_seed(7)
        return float_leaves(model(**inputs))


def _facts(model: nn.Module, inputs: dict[str, Any], subject: Subject) -> None:
    row = subject.row
    with torch.no_grad():
        row["seconds"]["forward"] = min(_timed(lambda: model(**inputs)) for _ in range(3))
    traced = subject.stage("trace", lambda: lora_fx.trace(model, inputs))
    if traced is None:
        return
    row["seconds"]["trace"] = min(row["seconds"]["trace"], _timed(lambda: lora_fx.trace(model, inputs)))
    row["holes"] = len(traced.holes)
    plan = subject.stage("plan", lambda: lora_fx.plan(traced, EVERYTHING))
    if plan is not None:
        row.update(coverage(model, inputs, plan))


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return round(time.perf_counter() - started, 4)


def gradient_names(model: nn.Module, inputs: dict[str, Any]) -> set[str]:
    """Return the parameters of two or more dimensions that full fine-tuning would move."""
    named = {n: p for n, p in model.named_parameters() if p.dim() >= 2 and p.is_floating_point()}
    flags = {n: p.requires_grad for n, p in named.items()}
    for parameter in named.values():
        parameter.requires_grad_(True)
    try:
        with preserved(model), torch.enable_grad():
            torch.manual_seed(7)
            live = [o for o in float_leaves(model(**inputs)) if o.requires_grad]
            total = torch.stack([(o * uneven(o)).sum().double() for o in live]).sum()
            slopes = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(flags[name])
    return {n for n, g in zip(named, slopes, strict=True) if g is not None and bool(g.any())}


def coverage(model: nn.Module, inputs: dict[str, Any], plan: lora_fx.Plan) -> Row:
    """Return the share of trainable elements that are adapted, why the rest is not, and the forms."""
    moved = gradient_names(model, inputs)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    reasons: Counter[str] = Counter()
    adapted = 0
    for name in moved:
        decision = plan[name]
        if decision.action == "adapt":
            adapted += sizes[name]
        else:
            reasons[f"{decision.reason.value}: {decision.detail}"] += sizes[name]
    total = sum(sizes[n] for n in moved)
    forms = Counter(d.form or "?" for d in plan.adapted)
    return {
        "sites": len(plan.adapted),
        "share": round(adapted / total, 5) if total else None,
        "shortfall": {why: round(n / total, 5) for why, n in reasons.most_common(4)},
        "forms": dict(forms),
        "adapted_without_gradient": len([d for d in plan.adapted if not moved & {d.name, *d.site.names}]),
    }


def _inject(model: nn.Module, inputs: dict[str, Any], row: Row) -> None:
    model.requires_grad_(False)  # torch picks kernels by requires_grad: hold it equal on both sides
    with torch.no_grad():
        before = outputs_of(model, inputs)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            lora_fx.inject(model, EVERYTHING, inputs, seed=0)
        row["warnings"] = [str(w.message)[:200] for w in heard if issubclass(w.category, UserWarning)][:3]
        after = outputs_of(model, inputs)
    assert same(before, after), f"the outputs changed at inject, by {far(after, before):.1e}"


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Say whether two lists of outputs are equal bit for bit (NaN equals NaN)."""
    return len(left) == len(right) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(left, right, strict=True)
    )


def far(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the largest |difference| / |reference| by norm over all outputs."""
    if [t.shape for t in found] != [t.shape for t in wanted]:
        return float("inf")
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        gap = torch.where(a == b, 0.0, a.double() - b.double()).norm()
        worst = max(worst, float(gap / torch.where(b.isfinite(), b, 0).double().norm().clamp_min(1e-30)))
    return worst


def randomise(model: nn.Module) -> None:
    """Move every trained parameter away from its start, as a few steps of training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lora_fx.parameters(model):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def _fold(model: nn.Module, inputs: dict[str, Any], row: Row) -> None:
    with torch.no_grad():
        with lora_fx.disable_adapter(model):
            base = outputs_of(model, inputs)
        randomise(model)
        found = outputs_of(model, inputs)
        assert not same(found, base), "random adapters change nothing"
        with lora_fx.folded(model):
            wanted = outputs_of(model, inputs)
    difference = far(found, wanted)
    if difference > TOLERANCE and wanted[0].dtype == torch.float32:
        return _fold(doubled(model), doubled(inputs), row)
    allowed = TOLERANCES[wanted[0].dtype]
    if difference > allowed and wanted[0].dtype == torch.float64:
        moved = _moved_by_rounding(model, inputs, wanted)
        allowed = max(allowed, min(ROUNDINGS * moved, TOLERANCE))
        row.setdefault("rounding", {})["fold"] = [difference, allowed]
    assert difference <= allowed, f"injected and folded differ by {difference:.2e}"
    return None


def _moved_by_rounding(model: nn.Module, inputs: dict[str, Any], wanted: list[Tensor]) -> float:
    """Return how far the folded model goes when its weights are rounded once."""
    moved = 0.0
    with torch.no_grad(), lora_fx.folded(model):
        for seed in range(2):
            with weights_rounded(model, seed):
                moved = max(moved, far(outputs_of(model, inputs), wanted))
    return moved


def _step(model: nn.Module, inputs: dict[str, Any]) -> None:
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    trained = lora_fx.parameters(model)
    optimiser = torch.optim.Adam(trained, lr=1e-3)
    live = [o for o in outputs_of(model, inputs) if o.requires_grad]
    torch.stack([(o * uneven(o)).sum() for o in live]).sum().backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    ours = {id(p) for p in trained}
    names = {n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in ours}
    moved = {
        n for n, p in model.state_dict().items() if not torch.equal(p.nan_to_num(), before[n].nan_to_num())
    }
    assert moved, "the step changed nothing"
    assert moved <= names, f"the step changed {sorted(moved - names)[:5]}"


def _roundtrip(model: nn.Module, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        outputs_of(model, inputs)  # a model that keeps its state from call to call holds no graph then
    base = copy.deepcopy(model)
    lora_fx.unload(base)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "adapter.safetensors"
        wanted = outputs_of(model, inputs)
        lora_fx.save_adapter(model, path)
        lora_fx.load_adapter(base, path, trainable=True)  # kernels are picked by requires_grad
        assert same(outputs_of(base, inputs), wanted), "the loaded adapter computes something else"
        lora_fx.unload(base)
        with lora_fx.disable_adapter(model):
            plain = outputs_of(model, inputs)
        assert same(outputs_of(base, inputs), plain), "the unloaded model is not the base"


def _verify(model: nn.Module, inputs: dict[str, Any], row: Row) -> None:
    report = lora_fx.verify(model, inputs)
    _told(row, report)
    if report.ok:
        return
    # Deep random networks amplify float32's rounding: then float64, where a fault would stay, decides.
    wide = doubled(model), doubled(inputs)
    row["float64"] = True
    report = lora_fx.verify(*wide)
    _told(row, report)
    report.raise_for_failure()


def _told(row: Row, report: lora_fx.Report) -> None:
    worst = report.worst
    row["comparisons"] = len(report.comparisons)
    row["notes"] = list(report.notes)
    row["worst"] = None if worst is None else worst.difference / worst.tolerance
    row["bad_sites"] = sorted({c.what for c in report.failures})[:8]
    if any(c.case.endswith("in float64") for c in report.comparisons):
        row["float64"] = True
    beyond = [c for c in report.comparisons if "within the base's own rounding" in c.case]
    if beyond:
        worst = max(beyond, key=lambda c: c.difference)
        row.setdefault("rounding", {})["verify"] = [worst.difference, worst.tolerance]


def doubled(value: Any) -> Any:
    """Return a copy in float64 of a model or of its inputs."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in value.items()}
