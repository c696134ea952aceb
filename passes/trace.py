"""Trace: run a model once on example inputs and write every torch call down in an fx graph."""

from __future__ import annotations

import contextlib
import copy
import gc
import sys
import warnings
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.jit._fuser import optimized_execution
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from lora_fx.errors import InputError
from lora_fx.passes.examples import Examples, named_inputs, own_copy, read_examples, tensors_in
from lora_fx.passes.parts import Parts, parts_of
from lora_fx.passes.preserve import preserved
from lora_fx.passes.recorder import Recorder
from lora_fx.passes.second_net import SecondNet
from lora_fx.passes.trace_text import describe


@dataclass(frozen=True, eq=False)
class Trace:
    """One recorded run: ``graph`` holds every torch call, the weights by qualified name.

    ``args`` and ``kwargs`` are the example inputs, ``examples`` says where they came from; ``holes``
    are tensors of unknown origin that the run read (a plain tensor attribute, say).
    """

    model: nn.Module
    graph: fx.Graph
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    examples: str = "given"
    holes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Print a header and one line per call, grouped by module."""
        return describe(self.model, self.graph, self.examples, self.holes)

    __repr__ = __str__


def trace(model: nn.Module, example_inputs: Any = None) -> Trace:
    """Record one run of the model, in the mode it is in, and leave it exactly as it was.

    Real, fake and meta tensors will do; a model that lies wholly on the meta device takes real inputs
    too. Uninitialised (lazy) parameters are initialised in a copy, never in the model itself.

    Raises:
        InputError: the inputs cannot be read, or the model raises on them (chained).
    """
    examples = read_examples(model, example_inputs)
    run = _Run(model, parts_of(model), examples)
    if any(is_lazy(t) for t in run.parts.tensors):
        subject = _initialised_copy(model, examples)
        run = _Run(subject, parts_of(subject), examples)
    recorder = _first_record(run)
    if recorder.unexplained:
        recorder = _look_deeper(run, recorder)
    return Trace(
        model,
        recorder.graph,
        examples.args,
        examples.kwargs,
        examples.source,
        tuple(recorder.holes),
    )


@dataclass(frozen=True, eq=False)
class _Run:
    """What is run."""

    model: nn.Module
    parts: Parts
    examples: Examples


def _first_record(run: _Run) -> Recorder:
    """Record without gradients, which holds no activations; a forward that takes gradients, with them."""
    without_compiler = "torch._dynamo" not in sys.modules
    try:
        return _record(run, deep=False)
    except InputError as error:
        if without_compiler and "torch._dynamo" in sys.modules:
            # The run brought the compiler in (flex_attention does): from now on it can be told to keep out.
            return _first_record(run)
        try:
            return _record(run, deep=False, gradients=True)
        except InputError:
            raise error from error.__cause__


def _record(run: _Run, *, deep: bool, gradients: bool = False) -> Recorder:
    """Record one run; a deep one sees operators that are called from compiled code too."""
    model = run.model
    args, kwargs = _placed(run)
    recorder = Recorder(run.parts)
    for name, tensor in named_inputs(model, args, kwargs):
        recorder.input(name, tensor)
    with (
        _quiet(run.parts, args, kwargs),
        _collecting_new_objects_only(),
        torch.set_grad_enabled(gradients),
        contextlib.ExitStack() as written,
        preserved(model, run.parts),
        contextlib.ExitStack() as stack,
    ):
        written.callback(recorder.restore_written)  # once every parameter is in its own memory again
        stack.enter_context(recorder.modules.following())
        stack.enter_context(recorder)
        if deep:
            # TorchScript's fused kernels hide their operators.
            stack.enter_context(optimized_execution(False))
            stack.enter_context(SecondNet(recorder))
        with _errors_named(model, recorder):
            output = model(*args, **kwargs)
    recorder.output({".".join(path): tensor for path, tensor in tensors_in(output)})
    return recorder


def _look_deeper(run: _Run, first: Recorder) -> Recorder:
    """Record again with the second net; where the model refuses to run under it, keep the first record."""
    try:
        return _record(run, deep=True)
    except InputError as error:
        first.holes.append(f"no second look at operators inside compiled code: {error.got}")
        return first


@contextlib.contextmanager
def _errors_named(model: nn.Module, recorder: Recorder | None = None) -> Generator[None]:
    """Inside, an error that the model raises is one about its inputs, and says in which module."""
    try:
        yield
    except Exception as error:
        where = "" if recorder is None else recorder.modules.raised_in(error)
        raise InputError(
            f"example_inputs of {type(model).__name__}",
            expected="inputs that the model runs with",
            got=f"{type(error).__name__} in {where or 'its forward'!r}: {error}",
            advice="Call model(*args, **kwargs) with them first; the model's own error is chained.",
        ) from error


@contextlib.contextmanager
def _quiet(parts: Parts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generator[None]:
    """Inside: no gradients, no attention fast path, no compiled code, the tensors' own fake mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(warnings.catch_warnings())
            # Compiled modules warn of global hooks; here they run as they are written.
            warnings.filterwarnings("ignore", message="Using `torch.compile")
            # Importing the compiler takes seconds: where nobody has, nothing is compiled.
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            mode = _fake_mode(parts, args, kwargs)
            if mode is not None:
                stack.enter_context(mode)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _collecting_new_objects_only() -> Generator[None]:
    """Inside, the garbage collector passes over what is there already: a graph's many objects make it run."""
    if gc.get_freeze_count():  # somebody else has told it what to pass over
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _fake_mode(parts: Parts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [*parts.tensors, *(t for _, t in tensors_in((args, kwargs)))]
    return next((mode for t in tensors if (mode := getattr(t, "fake_mode", None)) is not None), None)


def _initialised_copy(model: nn.Module, examples: Examples) -> nn.Module:
    """Return a copy of a model with lazy modules, run once so that they know their shapes."""
    subject = copy.deepcopy(model)
    args, kwargs = own_copy(examples.args, examples.kwargs)
    with _errors_named(model), _quiet(parts_of(subject), args, kwargs), torch.random.fork_rng():
        subject(*args, **kwargs)
    return subject


def _placed(run: _Run) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return copies of the inputs, on the meta device where the whole model is."""
    args, kwargs = own_copy(run.examples.args, run.examples.kwargs)
    if {t.device.type for t in run.parts.tensors} != {"meta"}:
        return args, kwargs
    moved = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
    return moved[0], moved[1]
