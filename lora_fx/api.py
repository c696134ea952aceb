"""The public functions: thin, each calls the passes in order and nothing else."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lora_fx.adapter_file import AdapterFile
from lora_fx.deciding import Model, fitted, module_of, plan_of, source_of, trace_of
from lora_fx.errors import AdapterFileError
from lora_fx.fingerprints import BaseCheck
from lora_fx.notices import warn_user
from lora_fx.passes import adapter_io, peft_io, remove, switch
from lora_fx.passes import fold as fold_pass
from lora_fx.passes import insert as insert_pass
from lora_fx.passes import verify as verify_pass
from lora_fx.passes.examples import read_examples
from lora_fx.passes.moved import note_written, written_in
from lora_fx.passes.norms import refuse_converted
from lora_fx.passes.precisions import halves_after
from lora_fx.passes.probe import probe
from lora_fx.passes.replaced import warn_replaced
from lora_fx.passes.runtime import injected
from lora_fx.passes.sharded import first_process
from lora_fx.passes.trace import Trace
from lora_fx.passes.trace import trace as record
from lora_fx.passes.unsaved import moved_buffers, named_writes, unsaved, unsaved_text
from lora_fx.passes.untrained import warn_unchanged
from lora_fx.passes.wrapped import refuse_parts, refuse_wrapped
from lora_fx.plans import Plan
from lora_fx.policy import Policy
from lora_fx.reports import Report

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def trace(model: nn.Module | ExportedProgram, example_inputs: Any = None) -> Trace:
    """Record one run of the model as an fx.Graph; the model is left exactly as it was.

    ``example_inputs`` is a tensor, a tuple of positional arguments, a mapping of keyword arguments, or
    ``(args, kwargs)``; without it, the model's own ``example_input_array`` or ``dummy_inputs``.

    Raises:
        InputError: the model does not run on these inputs, or there are none.
    """
    return record(module_of(model), example_inputs)


def plan(model_or_trace: Model | ExportedProgram, policy: Policy, example_inputs: Any = None) -> Plan:
    """Decide what inject would do, for every weight, and change nothing.

    Raises:
        InputError: the model does not run on the example inputs.
        PolicyError: a rule matches nothing, or needs a trace where there are no example inputs; or the
            policy is none.
    """
    return plan_of(source_of(model_or_trace), policy, example_inputs)[0]


def inject(
    model_or_trace: Model | ExportedProgram,
    policy_or_plan: Policy | Plan,
    example_inputs: Any = None,
    *,
    adapter: str = "default",
    seed: int | None = None,
    verify: bool = False,
) -> nn.Module:
    """Rewrite the model, in place, so that it trains low-rank adapters; return the same object.

    ``W = W0 + scale * B A`` everywhere the weight is used; at the start the model computes bit for bit
    what it did. Only adapters (and what ``Train`` and ``bias`` name) receive gradients. Where there
    are example inputs, every adapter is probed: it must act exactly as its delta on the weight would.
    ``seed`` fixes the adapters' first values; ``verify`` runs ``lora_fx.verify`` as well.

    Raises:
        InputError, PolicyError: as ``plan``.
        PlanError: the plan does not fit the model.
        AdapterNameError: there is an adapter of this name.
        WrappedModelError: the model is already wrapped for DDP, FSDP or tensor parallelism, or by peft.
        ProbeError: an adapter has no effect, or another than its delta. The model is left as it was.
    """
    source = source_of(model_or_trace)
    model = module_of(source)
    refuse_wrapped(model)
    refuse_parts(model)
    insert_pass.check_name(adapter, injected(model))
    if isinstance(policy_or_plan, Plan):
        traced = trace_of(source, example_inputs)
        decided = fitted(model, policy_or_plan, traced)
    else:
        decided, traced = plan_of(source, policy_or_plan, example_inputs)
    if not (decided.adapted or decided.trained or decided.extras):
        warn_user("The plan adapts and trains nothing: every parameter is frozen, and a step changes none.")
    insert_pass.insert(model, decided, adapter, seed)
    try:
        _probe(model, adapter, traced)
        if verify and traced is not None:
            verify_pass.verify(model, (traced.args, dict(traced.kwargs)), adapter).raise_for_failure()
    except BaseException:
        remove.remove(model, adapter)
        raise
    return model


def unload(model: nn.Module, adapter: str | None = None) -> nn.Module:
    """Take one adapter out of the model, or all of them; then every bit, class, flag and mode is back.

    Raises:
        AdapterNameError: the model has no adapters, or not this one.
    """
    return remove.unload(model, adapter)


def parameters(
    model: nn.Module, adapter: str | None = None, *, lr_ratio: float | None = None, lr: float = 1e-4
) -> list[Any]:
    """Return what an adapter trains (None: the active one), for an optimiser.

    With ``lr_ratio`` as two parameter groups, B learning ``lr_ratio`` times as fast as the rest (LoRA+,
    Hayou et al. 2024). A warning says where the adapter was loaded for inference: nothing of it is trained.

    Raises:
        AdapterNameError: the model has no adapters, or not this one.
        WrappedModelError: a frozen normalisation was replaced by a synchronised one.
    """
    record, name = switch.require(model, adapter)
    refuse_converted(model)
    if not record.trainable.get(name, False):
        note = f"The adapter {name!r} was loaded for inference: its parameters get no gradient"
        advice = "Load it with load_adapter(..., trainable=True) to train it on."
        warn_user(f"{note}. {advice}")
    slow, fast = switch.trained_parameters(model, name)
    if lr_ratio is None:
        return [*slow, *fast]
    return [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * lr_ratio}]


def set_adapter(model: nn.Module, adapter: str) -> None:
    """Make one adapter active; it alone is computed and trained.

    Raises:
        AdapterNameError: the model has no adapter of this name.
    """
    switch.set_adapter(model, adapter)


def disable_adapter(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """Inside the context, the model computes what the base computes.

    Raises:
        AdapterNameError: the model has no adapters.
    """
    return switch.disable_adapter(model)


def save_adapter(
    model: nn.Module,
    path: str | Path,
    adapter: str | None = None,
    *,
    format: Literal["lora_fx", "peft"] = "lora_fx",  # noqa: A002
) -> None:
    """Write an adapter (None: the active one), its plan and its base's fingerprints as one file, atomically.

    On a sharded model every process must call this; the first one writes, the others wait for it.
    Warns of buffers of the base that have moved since inject, which are not in the file, and of an adapter
    that changes no weight.
    With ``format="peft"`` as a folder that ``PeftModel.from_pretrained`` loads (an adapter that is not
    called "default" in a subfolder, as peft does), without plan and fingerprints.

    Raises:
        AdapterNameError: the model has no adapters, or not this one.
        AdapterFileError: the path is a folder's, or with ``format="peft"`` a file's; or an unknown format.
        PeftFormatError: the adapter holds what peft's format cannot; it is named.
    """
    if format not in {"lora_fx", "peft"}:
        expected, advice = 'format="lora_fx" or format="peft"', "Name one of them."
        raise AdapterFileError(str(path), expected=expected, got=repr(format), advice=advice)
    record, adapter = switch.require(model, adapter)
    file = adapter_io.collect(model, adapter)
    written = peft_io.as_peft(model, file) if format == "peft" else file
    target = peft_io.folder_of(path, adapter) if format == "peft" else path
    moved = moved_buffers(model, record, adapter)
    with first_process(model) as writes:
        if writes:
            written.write(target)
            warn_unchanged(adapter, file.deltas)
            loose = switch.trainable_base(model)
            if loose:
                more = f" and {len(loose) - 1} more" if len(loose) > 1 else ""
                warn_user(
                    f"base weights require a gradient and are not in the adapter's file: {loose[0]}{more}. "
                    "Trained, they make another base of it; Train(...) trains and saves a whole weight."
                )
            if moved:
                text = unsaved_text(moved, "since inject the model moved its own buffers")
                warn_user(f"{text}.")


def load_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    adapter: str = "default",
    trainable: bool | None = None,
    base_check: BaseCheck = "exact",
    replace: bool = False,
) -> nn.Module:
    """Read an adapter file or a peft folder into the model, injecting the file's own plan first.

    ``trainable`` says whether it can be trained; None: not, or with ``replace`` as before.
    With ``replace`` the file fills the adapter of this name that the model has, in place: going back to
    an earlier state, or loading after ``fully_shard`` (on every process) or DDP's wrapping.

    A peft folder carries no fingerprints: names and shapes are checked, and a warning says that nothing
    else is. For an adapter file ``base_check`` says what makes the base the right one: every bit, the
    values at the stored dtype (trained in bf16, folded in float32), or the shapes alone.

    Raises:
        AdapterFileError: the file is damaged, no adapter, or of another version.
        BaseMismatchError: the adapter was trained on another base.
        AdapterNameError: the model has an adapter of this name (with ``replace``: it has none).
        PlanError: the file's plan does not fit the model (with ``replace``: the adapter there).
        PeftFormatError: the peft folder holds what lora_fx cannot represent; it is named.
    """
    file = peft_io.read_peft(model, path, adapter) if Path(path).is_dir() else AdapterFile.read(path)
    if replace:
        adapter_io.refill(model, file, adapter, trainable=trainable, base_check=base_check)
        return model
    refuse_wrapped(model)
    refuse_parts(model)
    insert_pass.check_name(adapter, injected(model))
    file.check_base(insert_pass.base_tensors(model), base_check)
    adapter_io.install(model, file, adapter, trainable=bool(trainable))
    return model


def fold(model: nn.Module, *, min_retained: float = 0.25) -> nn.Module:
    """Put ``W`` in the base's place for good (peft: merge_and_unload); return the same object.

    On a sharded model every process must call this; each weight is gathered in turn.
    A half-precision weight rounds a part of a small delta away: below 90 % kept this warns, below
    ``min_retained`` it is refused.

    Raises:
        AdapterNameError: the model has no adapters.
        AdapterValueError: the adapter holds NaN or infinity, or is rounded away; the model is left as it
            was.
    """
    warn_replaced(model)
    return fold_pass.fold(model, min_retained=min_retained)


def folded(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """Inside the context, the model is the base model with ``W``; bitwise restored afterwards.

    Raises:
        AdapterNameError: the model has no adapters.
        AdapterValueError: the adapter holds NaN or infinity.
    """
    warn_replaced(model)
    return fold_pass.folded(model)


def _probe(model: nn.Module, adapter: str, traced: Trace | None) -> None:
    """Probe the adapter where the model can be run; note in its record how it went."""
    known = switch.record_of(model)
    if traced is None:
        known.probe = "not probed: there were no example inputs"
    elif any(p.device.type == "meta" for p in model.parameters()):
        known.probe = "not probed: the model is on the meta device"
    else:
        note_written(model, written_in(traced.graph))
        moves = unsaved(model, traced.graph)
        if moves is not None:
            warn_user(f"{moves}.")
        known.halves[adapter] = halves_after(traced.graph, known.plans[adapter])
        with named_writes(traced.graph, known.plans[adapter]):
            result = probe(model, adapter, (traced.args, dict(traced.kwargs)))
        known.probe = f"probed: largest relative difference {result.difference:.1e}"
        if result.without_effect:
            silent = ", ".join(result.without_effect[:3])
            note = f"{len(result.without_effect)} weights get no gradient on the example inputs: {silent}"
            known.probe += f"; {note}"
            warn_user(f"{note}. The base gives them none either.")


def verify(model: nn.Module, example_inputs: Any, *, adapter: str | None = None) -> Report:
    """Check the invariant on this model: injected against folded, outputs and gradients.

    Fills the adapter with random values, compares on the example inputs, on other values and on another
    batch size, in train and in eval, names the weights that disagree, and puts everything back.

    Raises:
        AdapterNameError: the model has no adapters, or not this one.
        InputError: the example inputs cannot be read, or the model does not run on them.
    """
    found = read_examples(model, example_inputs)
    return verify_pass.verify(model, (found.args, found.kwargs), adapter)
