"""Branches in an ONNX graph: a weight's adapter as two inputs of the graph, whose default is no adapter.

With ``L R`` the adapter's part of the matrix that a node multiplies with (``s B A``, either way round)::

    MatMul, Gemm    y = x M + (x L) R             L: (in, r)      R: (r, out)
    Gather          y = M[ids] + L[ids] R         L: (rows, r)    R: (r, columns)
    Conv            y = x * M + (x * L) * R       L: (r, in, kernel)    R: (out, r, 1...)

The inputs of a weight are called ``<weight>/A`` and ``<weight>/B``; their rank is open, each weight's for
itself, and by default 0. What has no such branch (recurrent, grouped, DoRA, trained in full) is an input as
a whole, whose default is the base's value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from lora_fx.adapter_file import AdapterFile
from lora_fx.matrix import MatrixForm
from lora_fx.passes.onnx_mapping import Recipe
from lora_fx.passes.onnx_patch import Patch
from lora_fx.passes.onnx_tensors import TORCH, from_torch

Factors = tuple[Tensor, Tensor]
"""``A`` (r, in) and ``B`` (out, r), the scale in it."""

_TESTED = 3
"""Rank of the random adapter with which a layout is tried out."""


@dataclass(frozen=True)
class Layout:
    """How ``A`` and ``B`` lie in the two inputs of a weight, and whether a matrix of the file is turned."""

    form: MatrixForm
    recipe: Recipe
    kernel: tuple[int, ...] | None
    turned: bool = False

    def inputs(self, a: Tensor, b: Tensor) -> Factors:
        """Return what the graph takes for ``A`` and ``B``."""
        if self.kernel is None:
            return a.T.contiguous(), b.T.contiguous()
        if self.recipe.scale is not None:
            b = b * torch.tensor(self.recipe.scale.factors, dtype=b.dtype)[:, None]
        ones = [1] * (len(self.kernel) - 1)
        return a.reshape(len(a), *self.kernel).contiguous(), b.reshape(*b.shape, *ones).contiguous()

    def adds(self) -> Tensor:
        """Return what the branch adds to the initializer for a random adapter."""
        a, b = self.tried()
        left, right = self.inputs(a, b)
        if self.kernel is not None:
            return (right.flatten(1) @ left.flatten(1)).reshape(self.recipe.shape)
        return (left @ right).T if self.turned else left @ right

    def tried(self) -> Factors:
        """Return a random adapter in float64."""
        random = torch.Generator().manual_seed(0)
        shapes = (_TESTED, self.form.in_features), (self.form.out_features, _TESTED)
        a, b = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)
        return a, b

    def right(self) -> bool:
        """Whether the branch adds what the initializer changes by."""
        a, b = self.tried()
        wide = Recipe(
            self.recipe.initializer, self.recipe.shape, "float64", self.recipe.perm, self.recipe.scale
        )
        wanted = wide.apply(self.form.weight(b @ a), torch.zeros(()))
        made = self.adds()
        return made.shape == wanted.shape and torch.allclose(made, wanted, rtol=1e-5, atol=1e-6)


def factors(file: AdapterFile, name: str) -> Factors | None:
    """Return a weight's adapter as one product, the scale in ``B``; None where it is not one."""
    decision = next((d for d in file.plan.adapted if d.name == name), None)
    if decision is None or decision.dora or decision.site.form.experts is not None:
        return None
    form, parts, _ = file.low_rank(name)
    rows = [part.b if part.rows is None else _spread(part.b, part.rows, form.out_features) for part in parts]
    # In float64, as a float64 base needs; what it is put into rounds it once.
    scaled = [b.double() * part.scale for b, part in zip(rows, parts, strict=True)]
    return torch.cat([part.a.double() for part in parts]), torch.cat(scaled, dim=1)


def _spread(b: Tensor, rows: Sequence[tuple[int, int]], count: int) -> Tensor:
    index = torch.cat([torch.arange(start, stop) for start, stop in rows])
    return b.new_zeros(count, b.shape[1]).index_copy(0, index, b)


def branch_inputs(model: ir.Model, file: AdapterFile, name: str, recipe: Recipe) -> Factors | None:
    """Return the values of a weight's two inputs for an adapter; None where it is not low-rank."""
    pair, shape = factors(file, name), model.graph.initializers[f"{name}/A"].shape
    if pair is None or shape is None:
        return None
    kernel = tuple(size for size in shape if isinstance(size, int)) if len(shape) > 2 else None
    return Layout(file.plan[name].site.form, recipe, kernel).inputs(*pair)


def add_inputs(model: ir.Model, patches: tuple[Patch, ...], file: AdapterFile) -> list[str]:
    """Give a base graph the inputs for an adapter, in place; return the weights that have a branch.

    What has none becomes an input as a whole.
    """
    branched: list[str] = []
    steps = [(step.name, step.recipe) for patch in patches for step in patch.steps]
    for name in dict.fromkeys(name for name, _ in steps):
        recipes = [recipe for owner, recipe in steps if owner == name]
        alone = all(sum(r.initializer == recipe.initializer for _, r in steps) == 1 for recipe in recipes)
        found = [_layout(model, file, name, recipe) for recipe in recipes] if alone else [None]
        ready = [layout for layout in found if layout is not None]
        if len(ready) == len(found) and (len(ready) == 1 or all(each.kernel is None for each in ready)):
            _branch(model, name, ready, number=len(branched))
            branched.append(name)
        else:
            for recipe in recipes:
                value = model.graph.initializers[recipe.initializer]
                if not value.is_graph_input():
                    model.graph.inputs.append(value)
    return branched


def _layout(model: ir.Model, file: AdapterFile, name: str, recipe: Recipe) -> Layout | None:
    """Return how a weight's adapter can be a branch at every use of an initializer, or None."""
    if factors(file, name) is None or recipe.runs is not None:
        return None
    form = file.plan[name].site.form
    value = model.graph.initializers[recipe.initializer]
    uses = [(use.node, use.idx) for use in value.uses()]
    if uses and all(_is_matrix(node, index) for node, index in uses) and len(recipe.shape) == 2:
        tried = [Layout(form, recipe, None, turned) for turned in (False, True)]
    elif uses and all(_is_convolution(node, index) for node, index in uses):
        if math.prod(recipe.shape[1:]) != form.in_features or (recipe.scale and recipe.scale.axis):
            return None
        tried = [Layout(form, recipe, recipe.shape[1:])]
    else:
        return None
    return next((layout for layout in tried if layout.right()), None)


def _is_matrix(node: ir.Node, index: int) -> bool:
    if node.op_type == "Gemm":
        return index == 1 and _number(node, "alpha", 1.0) == 1.0 and not _number(node, "transA", 0)
    if node.op_type == "Gather":
        return index == 0 and not _number(node, "axis", 0)
    return node.op_type == "MatMul" and index == 1


def _is_convolution(node: ir.Node, index: int) -> bool:
    return node.op_type == "Conv" and index == 1 and _number(node, "group", 1) == 1


def _number(node: ir.Node, name: str, default: float) -> float:
    found = node.attributes.get(name)
    return default if found is None else float(found.value)


def _branch(model: ir.Model, name: str, layouts: Sequence[Layout], *, number: int) -> None:
    """Add a weight's two inputs, and its branch at every use of the initializers that hold it."""
    first = model.graph.initializers[layouts[0].recipe.initializer]
    dtype = first.dtype
    assert dtype is not None
    empty = layouts[0].inputs(
        torch.zeros(0, layouts[0].form.in_features), torch.zeros(layouts[0].form.out_features, 0)
    )
    pair: list[ir.Value] = []
    for label, tensor in zip("AB", empty, strict=True):
        open_rank = [f"rank_{number}" if size == 0 else size for size in tensor.shape]
        value = ir.val(f"{name}/{label}", dtype, open_rank)
        value.const_value = from_torch(tensor.to(TORCH[dtype]), value.name or "")
        model.graph.inputs.append(value)
        model.graph.register_initializer(value)
        pair.append(value)
    for layout in layouts:
        value = model.graph.initializers[layout.recipe.initializer]
        for use in list(value.uses()):
            if layout.kernel is None:
                _multiply(use.node, pair, turned=layout.turned)
            else:
                _convolve(use.node, pair)


def _multiply(node: ir.Node, pair: Sequence[ir.Value], *, turned: bool) -> None:
    add = _Added(node)
    left, right = pair
    if turned != bool(_number(node, "transB", 0)):
        left, right = (add("Transpose", value, perm=[1, 0]) for value in (right, left))
    first = node.inputs[1 if node.op_type == "Gather" else 0]
    low = add("Gather", left, first, axis=0) if node.op_type == "Gather" else add("MatMul", first, left)
    add.to_output(add("MatMul", low, right))


def _convolve(node: ir.Node, pair: Sequence[ir.Value]) -> None:
    add = _Added(node)
    low = add("Conv", node.inputs[0], pair[0], attributes=list(node.attributes.values()))
    add.to_output(add("Conv", low, pair[1]))


class _Added:
    """Nodes that are put behind another one."""

    def __init__(self, node: ir.Node) -> None:
        self.node = node
        self.made: list[ir.Node] = []

    def __call__(
        self,
        op: str,
        *inputs: ir.Value | None,
        attributes: Sequence[ir.Attr] = (),
        **more: int | list[int],
    ) -> ir.Value:
        """Add a node and return its output."""
        given = [*attributes, *ir.convenience.convert_attributes(dict(more))]
        node = ir.Node("", op, inputs, given, version=self.node.version)
        node.outputs[0].name = f"{self.node.outputs[0].name}__adapter_{len(self.made)}"
        node.outputs[0].type = self.node.outputs[0].type
        self.made.append(node)
        return node.outputs[0]

    def to_output(self, branch: ir.Value) -> None:
        """Add the branch to what the node gives, wherever that is used."""
        given = self.node.outputs[0]
        total = self("Add", given, branch)
        total.shape = given.shape
        graph = self.node.graph
        assert graph is not None
        graph.insert_after(self.node, self.made)
        ir.convenience.replace_all_uses_with(given, total, replace_graph_outputs=True)
        self.made[-1].replace_input_with(0, given)
        given.name, total.name = f"{given.name}__base", given.name
