"""One export of a subject: the base file, and folded files made from it.

The base is exported once. A folded file is the base file with other numbers: patched where it is
known how the changed parameters lie in it, or else made by optimising the unoptimised export again
with the new weights.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from lora_fx.certificates import Certificate, Check
from lora_fx.errors import BaseMismatchError, CertificateError
from lora_fx.fingerprints import fingerprint
from lora_fx.passes import onnx_files
from lora_fx.passes.certify import effect_check, environment, examine
from lora_fx.passes.certify_errors import FLOOR
from lora_fx.passes.certify_parity import parity_check
from lora_fx.passes.examples import fresh
from lora_fx.passes.extent import Extent
from lora_fx.passes.onnx_base import make_base, make_graph
from lora_fx.passes.onnx_canonical import canonical
from lora_fx.passes.onnx_draws import Draws
from lora_fx.passes.onnx_files import DataFile
from lora_fx.passes.onnx_inputs import map_tensors
from lora_fx.passes.onnx_mapping import ParameterMap
from lora_fx.passes.onnx_match import Parameters
from lora_fx.passes.onnx_metadata import lossy_notes, read_map, write_base, write_folded
from lora_fx.passes.onnx_parity import feeds_for
from lora_fx.passes.onnx_patch import find_patches
from lora_fx.passes.onnx_program import DynamicShapes, Program, program
from lora_fx.passes.onnx_refusals import refuse_folded, refuse_onto_data
from lora_fx.passes.onnx_runtime import Opened, Refused, open_pair
from lora_fx.passes.onnx_state import cast_state, evaluating
from lora_fx.passes.onnx_subject import Inputs, Subject
from lora_fx.passes.preserve import preserved
from lora_fx.passes.trace import trace
from lora_fx.providers import choose


@dataclass(frozen=True)
class ExportOptions:
    """How to export: see ``export_onnx``; ``precision`` None keeps the model's own."""

    dynamic_shapes: DynamicShapes | None = None
    opset: int | None = None
    precision: torch.dtype | None = None
    certify: bool = True

    def target(self, dtype: torch.dtype) -> int | None:
        """Return the opset to ask for: in bfloat16 the first in which convolution and its like take it."""
        return 22 if self.opset is None and dtype is torch.bfloat16 else self.opset


class ExportJob:
    """One export: what is exported, how, and the unoptimised graph once it is there."""

    def __init__(self, subject: Subject, inputs: Inputs, options: ExportOptions) -> None:
        self.subject = subject
        self.inputs = inputs
        self.options = options
        self.precision = options.precision
        self._program: Program | None = None
        self._passed_over: dict[str, str] = {}
        self._derived: ir.Model | None = None

    def stored(self, tensor: Tensor) -> Tensor:
        """Return a value in the dtype of the file."""
        if self.precision is None or not tensor.is_floating_point():
            return tensor.detach().cpu()
        return tensor.detach().cpu().to(self.precision)

    def dtype(self) -> torch.dtype:
        """Return the narrowest dtype that weights have in the file."""
        if self.precision is not None:
            return self.precision
        with self.base() as model:
            floats = {p.dtype for p in model.parameters() if p.dtype in FLOOR}
        return min(floats, key=lambda dtype: (dtype.itemsize, -torch.finfo(dtype).eps), default=torch.float32)

    def program(self, like: ir.Model | None = None) -> Program:
        """Return the unoptimised graph of the base, translated at the first call, ``like`` an earlier one."""
        if self._program is None:
            with self.base() as model:
                self._program = program(
                    model,
                    self.cast_inputs(),
                    dynamic_shapes=self.options.dynamic_shapes,
                    opset=self.options.target(self.dtype()),
                    like=like,
                    passed_over=self._passed_over,
                )
        return self._program

    def cast_inputs(self) -> Inputs:
        """Return the example inputs in the precision of the file."""
        dtype = self.precision
        if dtype is None:
            return self.inputs
        return map_tensors(self.inputs, lambda t: t.to(dtype) if t.is_floating_point() else t)

    def check_inputs(self) -> None:
        """Run the base once, before anything is translated or written.

        Raises:
            InputError: it does not run on the example inputs, in the file's precision or its own.
        """
        try:
            with self.base() as model, preserved(model):
                args, kwargs = fresh(self.cast_inputs())
                model(*args, **kwargs)
        except Exception:  # noqa: BLE001 - whatever it is, recording the run says it better
            with self.subject.base_state() as model, evaluating(model):
                trace(model, self.inputs)

    @contextmanager
    def base(self) -> Generator[nn.Module]:
        """Give the base model in eval mode, in the precision of the file."""
        with self.subject.base_state() as model, evaluating(model):
            if self.precision is None:
                yield model
            else:
                with cast_state(model, self.precision):
                    yield model

    def export_base(self, path: Path, *, prove: bool) -> Certificate:
        """Export the base, with the map of its parameters in its metadata.

        Where a file in which something varies computes something else than the model (the exporter has
        written a size into it), less may vary in the next one, as where translation fails.

        Raises:
            CertificateError: the file in which nothing varies, or what was asked to, is wrong as well.
        """
        while True:
            try:
                return self._export_base(path, prove=prove)
            except CertificateError as error:
                made = self.program()
                if made.last:
                    raise
                self._passed_over[made.attempt] = f"it computes something else: {error.got}"
                self._program = None

    def _export_base(self, path: Path, *, prove: bool) -> Certificate:
        optimised, mapping = make_base(self.program(), self.parameters())
        onnx_files.strip(optimised)
        with onnx_files.draft(path) as draft:
            draft.write(optimised, finish=lambda model, data: write_base(model, mapping, data))
            certificate = self.base_certificate(draft.path, path, mapping) if prove else None
            draft.publish()
        return certificate or Certificate(path.name, path.name, (), {}, ("not certified, as asked",))

    def parameters(self) -> Parameters:
        """Return every parameter and buffer of the base, with all its names."""
        with self.base() as model:
            found: dict[int, tuple[Tensor, list[str]]] = {}
            for named in (
                model.named_parameters(remove_duplicate=False),
                model.named_buffers(remove_duplicate=False),
            ):
                for name, tensor in named:
                    found.setdefault(id(tensor), (tensor, []))[1].append(name)
            return {names[0]: (tensor.detach(), tuple(names)) for tensor, names in found.values()}

    def base_certificate(self, draft: Path, path: Path, mapping: ParameterMap) -> Certificate:
        """Prove a base file against the torch model."""
        runtime = choose()
        notes = list(self.program().notes)
        try:
            opened, _ = open_pair(draft, draft, runtime, notes)
        except Refused as error:
            failed = Check("runtime", ok=False, detail=str(error), place="the file")
            return _raise(Certificate(path.name, path.name, (failed,), environment(runtime), tuple(notes)))
        parity = self.parity(opened, opened, notes)
        unclear = [name for name, placement in mapping.placements.items() if placement.status == "opaque"]
        if unclear:
            notes.append(f"an adapter on these needs a new export: {', '.join(unclear[:5])}")
        return _raise(Certificate(path.name, path.name, (parity,), environment(runtime), tuple(notes)))

    def export_folded(self, base_path: Path, path: Path, *, prove: bool) -> Certificate:
        """Make the folded file from the base file."""
        base = onnx_files.load(base_path)
        refuse_folded(base, base_path)
        refuse_onto_data(path, base, base_path.parent)
        mapping = self.check_base(base, base_path)
        digest = canonical(base).digest
        folded = self.fold_into(base, mapping)

        def finish(written: ir.Model, data: DataFile | None) -> None:
            extents = self.extents()
            write_folded(written, plan=self.subject.plan, extents=extents, digest=digest, data=data)

        with onnx_files.draft(path) as draft:
            draft.write(folded, finish=finish)
            if prove:
                certificate = self.folded_certificate(base_path, draft.path, path)
            else:
                certificate = Certificate(base_path.name, path.name, (), {}, ("not certified, as asked",))
            draft.publish()
        return certificate.noted(*lossy_notes(self.extents()))

    def check_base(self, base: ir.Model, base_path: Path) -> ParameterMap | None:
        """Return the base file's map, after checking that it is this model's base.

        Raises:
            BaseMismatchError: a changed weight has other values there, or the base has none of them.
        """
        mapping = read_map(base)
        if mapping is None:
            return None
        changed = list(self.subject.changes)
        if changed and not any(mapping.find(name) for name in changed):
            raise BaseMismatchError(
                str(base_path),
                expected=f"this model's base, with {changed[0]} in it",
                got="a base file with none of the weights that the adapter changes",
                advice="Pass the base file of this model, or a new path to have it made.",
            )
        for name, change in self.subject.changes.items():
            placement = mapping.find(name)
            if placement is None or placement.fingerprint is None:
                continue
            if placement.fingerprint != fingerprint(self.stored(change.before)):
                raise BaseMismatchError(
                    f"{base_path}: {name}",
                    expected="the base weights of this model, in the precision asked for",
                    got=f"{placement.fingerprint.dtype} weights with another hash",
                    advice="Pass the base file of this model, or a new path to have it made.",
                )
        return mapping

    def fold_into(self, base: ir.Model, mapping: ParameterMap | None) -> ir.Model:
        """Return the folded graph: the base patched, or a new optimisation where that cannot be."""
        patches = find_patches(base, mapping, self.subject.weights) if mapping is not None else None
        if patches is not None and not patches.opaque and not patches.missing:
            for patch in patches.patches:
                base.graph.initializers[patch.initializer].const_value = patch.lazy()
            return base
        changed = {
            each: self.stored(change.after)
            for name, change in self.subject.changes.items()
            for each in (name, *change.names)
        }
        made = self.program(like=base)
        values = {name: value for name, value in changed.items() if name in made.names}
        parameters = {n: (changed.get(n, value), names) for n, (value, names) in self.parameters().items()}
        folded = make_graph(made.holding(values), parameters)
        onnx_files.strip(folded)
        self._derived = folded
        return folded

    def extents(self) -> dict[str, Extent]:
        """Return how much each weight was changed, and what its dtype kept of it."""
        found: dict[str, Extent] = {}
        for name, change in self.subject.changes.items():
            extent = Extent.of(change.before, change.after, self.stored(change.after))
            found[name] = replace(extent, retained=min(extent.retained, change.retained))
        return found

    def folded_certificate(self, base_path: Path, draft: Path, path: Path) -> Certificate:
        """Prove a folded file against its base and the torch model."""
        evidence = examine(base_path, draft, self.subject.weights, derived=self._derived)
        checks, notes = list(evidence.checks), list(evidence.notes)
        if evidence.base is not None and evidence.folded is not None:
            if self._program is not None:
                notes += self._program.notes
            checks.append(self.parity(evidence.base, evidence.folded, notes))
            checks.append(effect_check(evidence, feeds_for(evidence.base.session, self.inputs)))
        return _raise(
            Certificate(base_path.name, path.name, tuple(checks), environment(evidence.runtime), tuple(notes))
        )

    def parity(self, base: Opened, folded: Opened, notes: list[str]) -> Check:
        """Compare the runtime with the torch model."""
        return parity_check(
            self.subject,
            self.inputs,
            base.session,
            folded.session,
            precision=self.dtype(),
            notes=notes,
            drawn=Draws.of(folded.graph),
        )


def _raise(certificate: Certificate) -> Certificate:
    """Return a certificate that holds.

    Raises:
        CertificateError: it does not; the error carries it as ``certificate``.
    """
    try:
        return certificate.raise_for_failure()
    except CertificateError as error:
        error.add_note(str(certificate))
        raise
