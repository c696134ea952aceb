"""Certify: prove that a folded ONNX file is its base with exactly the adapter's weights changed.

``structure``          same nodes, attributes, wiring, shapes, dtypes, opsets (names made up by the
                       exporter aside)
``changed-set``        exactly the weights that the adapter changes differ from the base
``delta``              each of them holds W, to rounding
``derived``            (where the exporter computed constants from a changed weight) they are what it
                       makes of W; from files alone this cannot be proven, and fails
``base-data``          (overlays) the base's data file is the one that the overlay was made over
``untouched``          every other initializer is the base's, bit for bit
``runtime-structure``  the same graph after the runtime's own optimisation on the provider in use
``effect``             the outputs differ from the base's, and are finite where those are
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lora_fx.adapter_file import AdapterFile
from lora_fx.certificates import Certificate, Check
from lora_fx.passes import onnx_files, onnx_parity
from lora_fx.passes.certify_values import Pairs, value_checks
from lora_fx.passes.onnx_adapter import base_map
from lora_fx.passes.onnx_canonical import canonical
from lora_fx.passes.onnx_diff import Comparison, compare
from lora_fx.passes.onnx_draws import Draws
from lora_fx.passes.onnx_feeds import runnable_feeds
from lora_fx.passes.onnx_files import file_sha256
from lora_fx.passes.onnx_mapping import MAPPING_KEY, ParameterMap
from lora_fx.passes.onnx_metadata import BASE_DATA_KEY, read_changes, read_data, read_map
from lora_fx.passes.onnx_runtime import Opened, Refused, open_pair
from lora_fx.passes.onnx_tensors import same_tensor
from lora_fx.passes.weights import Weights, adapter_weights
from lora_fx.providers import Providers, Runtime, choose


@dataclass(frozen=True)
class Evidence:
    """The static checks, and the open sessions for those that run the files."""

    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    base: Opened | None
    folded: Opened | None
    runtime: Runtime


def environment(runtime: Runtime) -> dict[str, str]:
    """Return the versions and the provider under which checks ran."""
    names = ("lora_fx", "torch", "onnx", "onnxscript")
    found = {name: importlib.metadata.version(name) for name in names}
    for name in ("onnxruntime-gpu", "onnxruntime"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "provider": runtime.first}


def examine(
    base_path: Path,
    folded_path: Path,
    weights: Weights | None,
    file: AdapterFile | None = None,
    *,
    providers: Providers = "auto",
    derived: ir.Model | None = None,
) -> Evidence:
    """Make every check that needs no torch model; open both files in the runtime.

    ``derived`` holds what the exporter computes from the changed weights, where no recipe says it.
    """
    base, folded = onnx_files.load(base_path), onnx_files.load(folded_path)
    runtime = choose(providers)
    data = [_base_data(folded, folded_path.parent)] if BASE_DATA_KEY in folded.metadata_props else []
    if data and not data[0].ok:
        # Over other data than its own an overlay is a mixture, of which nothing else can be said.
        return Evidence(tuple(data), (), None, None, runtime)
    comparison = compare(base, folded)
    checks = [structure_check("structure", base, folded, comparison=comparison)]
    notes: list[str] = []
    pairs = comparison.pairs if comparison.difference is None else _by_name(base, folded)
    mapping = read_map(base) if file is None else base_map(base, file)
    if weights is None:
        checks += [_changed(pairs, _noted(base, folded), notes), *data]
    else:
        checks += [*_value_checks(base, pairs, mapping, weights, derived, notes), *data]
    try:
        first, second = open_pair(base_path, folded_path, runtime, notes)
    except Refused as error:
        checks.append(Check("runtime-structure", ok=False, detail=str(error), place=error.place))
        return Evidence(tuple(checks), tuple(notes), None, None, runtime)
    checks.append(structure_check("runtime-structure", first.graph, second.graph, sharing=False))
    return Evidence(tuple(checks), tuple(notes), first, second, runtime)


def structure_check(
    name: str,
    base: ir.Model,
    folded: ir.Model,
    *,
    comparison: Comparison | None = None,
    sharing: bool = True,
) -> Check:
    """Compare canonical digests; name the first difference where they differ."""
    digests = canonical(base, sharing=sharing).digest, canonical(folded, sharing=sharing).digest
    data = {"base": digests[0], "folded": digests[1]}
    difference = (comparison or compare(base, folded, sharing=sharing)).difference
    if digests[0] == digests[1] and difference is None:
        nodes = sum(1 for _ in base.graph)
        return Check(
            name, ok=True, detail=f"{nodes} nodes, digest {digests[0][:12]} on both sides", data=data
        )
    if difference is None:
        return Check(name, ok=False, detail="the digests differ", place="the graph", data=data)
    found = f"the base has {difference.base}, this file has {difference.other}"
    return Check(name, ok=False, detail=found, place=difference.place, data=data)


def _by_name(base: ir.Model, folded: ir.Model) -> Pairs:
    theirs = folded.graph.initializers
    return [(value, theirs[name]) for name, value in base.graph.initializers.items() if name in theirs]


def _value_checks(
    base: ir.Model,
    pairs: Pairs,
    mapping: ParameterMap | None,
    weights: Weights,
    derived: ir.Model | None,
    notes: list[str],
) -> Sequence[Check]:
    if mapping is None:
        return [_changed(pairs, None, notes)]
    if MAPPING_KEY not in base.metadata_props:
        notes.append("the base file has no map of its parameters: they were found by their fingerprints")
    return value_checks(base, pairs, mapping, weights, derived)


def _noted(base: ir.Model, folded: ir.Model) -> frozenset[str] | None:
    """Return where the base holds what the folded file says that it changes, if both say so."""
    changes, mapping = read_changes(folded.metadata_props), read_map(base)
    if not changes or mapping is None:
        return None
    placements = [placement for name in changes if (placement := mapping.find(name)) is not None]
    recipes = (recipe.initializer for placement in placements for recipe in placement.recipes)
    return frozenset((*recipes, *(each for placement in placements for each in placement.opaque)))


def _changed(pairs: Pairs, noted: frozenset[str] | None, notes: list[str]) -> Check:
    """Tell which initializers differ; where the folded file says which it changes, no other may."""
    changed = sorted(b.name or "" for b, o in pairs if not same_tensor(b.const_value, o.const_value))
    data = {"changed": changed}
    foreign = [name for name in changed if noted is not None and name not in noted]
    if foreign:
        detail = f"differs, where the file says that it changes nothing ({len(foreign)} such): another base?"
        return Check("changed", ok=False, detail=detail, place=f"initializer {foreign[0]!r}", data=data)
    if noted is None:
        notes.append("which initializers should have changed is not known: no adapter was given")
    else:
        notes.append("by how much initializers should have changed is not known: no adapter was given")
    detail = f"{len(changed)} of {len(pairs)} initializers differ" + ": " * bool(changed)
    detail += ", ".join(changed[:5])
    return Check("changed", ok=bool(changed), detail=detail, place="the weights", data=data)


def _base_data(folded: ir.Model, folder: Path) -> Check:
    """Compare an overlay's base data with what it was made over."""
    files = read_data(folded.metadata_props, BASE_DATA_KEY)
    for file in files:
        path = folder / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            found = "is not there" if not path.is_file() else f"has {path.stat().st_size} bytes"
            return Check("base-data", ok=False, detail=f"{found}, not {file.size}", place=file.name)
        if file_sha256(path) != file.sha256:
            return Check("base-data", ok=False, detail="holds other weights", place=file.name)
    names = ", ".join(file.name for file in files)
    return Check("base-data", ok=True, detail=f"the overlay's base data is there, with its hash: {names}")


def effect_check(evidence: Evidence, feeds: Mapping[str, Any]) -> Check:
    """Run both files on the same inputs: the outputs must differ, and be finite where the base's are."""
    assert evidence.base is not None
    assert evidence.folded is not None
    try:
        before = onnx_parity.run(evidence.base.session, feeds)
        after = onnx_parity.run(evidence.folded.session, feeds)
    except onnx_parity.RuntimeFault as error:
        return Check("effect", ok=False, detail=str(error), place="the runtime")
    drawn = Draws.of(evidence.folded.graph)
    before, after = drawn.others(before), drawn.others(after)
    if drawn.every:
        return Check("effect", ok=True, detail=drawn.nothing)
    gap = onnx_parity.distance(after, before)
    if gap == float("inf"):
        return Check("effect", ok=False, detail="the folded outputs are not finite", place="the outputs")
    if gap == 0:
        return Check("effect", ok=False, detail="the outputs are the base's", place="the outputs")
    return Check(
        "effect", ok=True, detail=f"the outputs move by {gap:.3g} of their norm", data={"moved": gap}
    )


def certify(
    base_onnx: str | Path,
    folded_onnx: str | Path,
    *,
    adapter: str | Path | AdapterFile | None = None,
    providers: Providers = "auto",
    name: str | None = None,
) -> Certificate:
    """Return the certificate of a folded file against its base.

    With the adapter, the changed initializers are checked against what it makes of the base's own
    weights; without, which of them changed is reported, and compared with what the file itself says that
    it changes. ``name`` is what the certificate calls
    the folded file (None: as it is called).

    Raises:
        ExportError: a file is no ONNX model.
        AdapterFileError: the adapter file cannot be read.
        ProviderError: the provider asked for is not there.
    """
    base_path, folded_path = Path(base_onnx), Path(folded_onnx)
    file = AdapterFile.read(adapter) if isinstance(adapter, (str, Path)) else adapter
    weights = None if file is None else adapter_weights(file)
    evidence = examine(base_path, folded_path, weights, file, providers=providers)
    checks = list(evidence.checks)
    if evidence.base is not None:
        checks.append(effect_check(evidence, runnable_feeds(evidence.base.session, seed=0)))
    return Certificate(
        base_path.name,
        name or folded_path.name,
        tuple(checks),
        environment(evidence.runtime),
        evidence.notes,
    )
