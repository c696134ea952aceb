"""Plans and audits as tables, for the terminal and as text."""

from __future__ import annotations

import io
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console, Group, RenderableType
from rich.text import Text

from lora_fx.collapsed import exact_groups
from lora_fx.fitted import FittedTable
from lora_fx.matrix import Rows

if TYPE_CHECKING:
    from lora_fx.audits import Audit, AuditRow
    from lora_fx.plans import Decision, Plan

_STYLE: Mapping[str, str] = {"adapt": "green", "train": "cyan", "skip": "dim"}
_WIDTH = 160
_LONGEST_ROLES = 36


def as_text(renderable: RenderableType) -> str:
    """Return what rich would show, as plain text: as wide as the terminal (or COLUMNS), 160 without."""
    buffer = io.StringIO()
    width = shutil.get_terminal_size((_WIDTH, 0)).columns
    Console(file=buffer, width=width, color_system=None, force_terminal=False).print(renderable)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().splitlines())


def plan_table(plan: Plan) -> Group:
    """Render a plan; weights that differ in layer numbers only share a line."""
    table = FittedTable(
        ("weight", "n", "kind", "shape", "roles", "decision", "rank", "trained", "form", "why")
    )
    rules = _numbered(d.rule for d in plan.decisions)
    groups = _grouped(plan.decisions)
    lines = [_spoken_for(group) for group in groups]
    reasons, expected = _shared_reasons(lines), _expectations(lines)
    for first, group in zip(lines, groups, strict=True):
        table.add_row(
            name_pattern([d.name for d in group]),
            str(len(group)),
            first.site.kind,
            shape_text(first.site.shape),
            _roles_cell(first.site.roles),
            first.action,
            ranks_text(first),
            f"{sum(d.parameters for d in group):,}" if first.action != "skip" else "",
            form_text(first, expected),
            why_text(first, rules, reasons),
            style=_STYLE[first.action],
        )
    counts = (
        f"{len(plan.decisions)} weights, {len(plan.adapted)} adapted, {len(plan.trained)} trained in full"
    )
    trained = trained_text(plan.parameters, plan.base_parameters)
    below = [
        *_legend(rules, reasons, expected),
        *(f"also trained: {extra.name} ({shape_text(extra.shape)}), {extra.detail}" for extra in plan.extras),
        f"{counts}; {trained}, {bytes_text(plan.adapter_bytes)}",
        *(f"note: {note}" for note in plan.notes),
    ]
    return Group(_title("Plan", plan.model, plan.examples), table, *map(Text, below))


def audit_table(audit: Audit) -> Group:
    """Render an audit, weights that differ in layer numbers only on one line, then the totals."""
    table = FittedTable(
        ("weight", "n", "kind", "shape", "roles", "decision", "rank", "trained", "form", "|dW|/|W|", "why")
    )
    rules = _numbered(row.rule for row in audit.rows)
    groups = _gathered(audit.rows, _row_key)
    rows = [_spoken_for(group) for group in groups]
    reasons, expected = _shared_reasons(rows), _expectations(rows)
    for row, group in zip(rows, groups, strict=True):
        trained = sum(r.parameters for r in group)
        table.add_row(
            name_pattern([r.name for r in group]),
            str(len(group)),
            row.kind,
            shape_text(row.shape),
            _roles_cell(row.roles),
            row.action,
            row.rank_text,
            f"{trained:,}" if trained else "",
            form_text(row, expected),
            _deltas_text([r.delta for r in group if r.delta is not None]),
            why_text(row, rules, reasons),
            style=_STYLE[row.action],
        )
    totals = audit.totals
    others = f"{totals.extras} other parameter" + ("s" if totals.extras != 1 else "")
    forms = ", ".join(f"{count} {form}" for form, count in totals.forms.items())
    counts = (
        f"{totals.sites} weights: {totals.adapted} adapted ({forms or 'none'}), {totals.trained} trained in "
        f"full, {totals.skipped} left as they are; {others} trained"
    )
    share = trained_text(totals.parameters, totals.base_parameters)
    sizes = f"branch share {totals.branch_share:.0%}; {share}, {bytes_text(totals.adapter_bytes)}"
    lines = [*_legend(rules, reasons, expected), counts, sizes, *(f"note: {note}" for note in audit.notes)]
    return Group(_title(f"Audit of {audit.source}", audit.model, audit.examples), table, *map(Text, lines))


def _title(what: str, model: str, examples: str | None) -> Text:
    shown = f"{what}: {model}" if model else what
    return Text(f"{shown}; example inputs: {examples or 'none'}", style="bold")


def _numbered(rules: Iterable[str | None]) -> dict[str, int]:
    """Number the rules in the order in which they first decide something."""
    found = dict.fromkeys(rule for rule in rules if rule is not None)
    return {rule: number for number, rule in enumerate(found, start=1)}


def _shared_reasons(lines: Sequence[Decision | AuditRow]) -> dict[str, int]:
    """Number the reasons against the branch form that several lines of a table share."""
    counts = Counter(line.form_reason for line in lines if line.form in ("weight", "mixed"))
    return _numbered(reason for reason, count in counts.items() if count > 1)


def _expectations(lines: Sequence[Decision | AuditRow]) -> dict[str, int]:
    """Number what the cost model expects of the adapted weights."""
    return _numbered(_told(line) for line in lines if line.expected)


def _told(line: Decision | AuditRow) -> str:
    return f"{line.expected}: {line.expected_reason}"


def _legend(rules: Mapping[str, int], reasons: Mapping[str, int], expected: Mapping[str, int]) -> list[str]:
    return [
        *(f"[{number}] {rule}" for rule, number in rules.items()),
        *(f"[f{number}] {reason}" for reason, number in reasons.items()),
        *(f"[c{number}] {told}" for told, number in expected.items()),
    ]


def form_text(line: Decision | AuditRow, expected: Mapping[str, int]) -> str:
    """Return the form, and the number of what the cost model expects of it."""
    number = expected.get(_told(line)) if line.expected else None
    return (line.form or "") if number is None else f"{line.form} [c{number}]"


def why_text(decided: Decision | AuditRow, rules: Mapping[str, int], reasons: Mapping[str, int]) -> str:
    """Return the reason, the deciding rule's number, the detail, and why the form is no branch."""
    number = f" [{rules[decided.rule]}]" if decided.rule is not None else ""
    texts = [decided.detail] if decided.detail else []
    if decided.form in ("weight", "mixed"):
        shared = reasons.get(decided.form_reason)
        reason = f": {decided.form_reason}" if shared is None else f" [f{shared}]"
        texts.append(f"{decided.form} form{reason}")
    return f"{decided.reason}{number}" + (f": {'; '.join(texts)}" if texts else "")


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as ``768x3072``."""
    return "x".join(map(str, shape)) or "scalar"


def rows_text(rows: Rows | None) -> str:
    """Return rows as ``0:768`` ranges; many ranges by their first, their number and their sum."""
    if rows is None:
        return "all"
    if len(rows) <= 2:
        return ",".join(f"{start}:{stop}" for start, stop in rows)
    total = sum(stop - start for start, stop in rows)
    return f"{rows[0][0]}:{rows[0][1]},.. {len(rows)} ranges, {total} rows"


def roles_text(roles: Mapping[str, Rows | None]) -> str:
    """Return roles with their rows, rows left out where a role has all of them."""
    return " ".join(role if rows is None else f"{role}[{rows_text(rows)}]" for role, rows in roles.items())


def _roles_cell(roles: Mapping[str, Rows | None]) -> str:
    """Return roles in one line, or one below the other where that is long."""
    text = roles_text(roles)
    if len(text) <= _LONGEST_ROLES:
        return text
    return "\n".join(roles_text({role: rows}) for role, rows in roles.items())


def ranks_text(decision: Decision) -> str:
    """Return the rank, or the rank of every part with its role."""
    parts = decision.parts
    if len(parts) == 1 and parts[0].role is None:
        return str(parts[0].rank)
    return " ".join(f"{part.role}:{part.rank}" for part in parts)


def bytes_text(count: int) -> str:
    """Return a size in decimal units: ``37.7 MB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def trained_text(parameters: int, base_parameters: int) -> str:
    """Return how many parameters are trained, with their share where the base's number is known."""
    if not base_parameters:
        return f"{parameters:,} parameters trained"
    share = parameters / base_parameters
    digits = max(2, 1 - math.floor(math.log10(share)) - 2) if share else 2
    return f"{parameters:,} of {base_parameters:,} parameters trained ({share:.{digits}%})"


_Line = TypeVar("_Line", bound="Decision | AuditRow")


def _gathered(lines: Iterable[_Line], key: Callable[[_Line], tuple[object, ...]]) -> list[list[_Line]]:
    """Gather lines whose weights differ in layer numbers only, as far as a pattern names them exactly."""
    groups: dict[tuple[object, ...], list[_Line]] = {}
    for line in lines:
        told = (line.action, line.form, line.reason, line.rule, _wild(line.detail), _wild(line.form_reason))
        expected = (line.expected, line.expected_reason)
        pattern = name_pattern([line.name], wild=True)
        groups.setdefault((pattern, *told, *expected, *key(line)), []).append(line)
    return [exact for group in groups.values() for exact in exact_groups(group, _told_numbers)]


def _told_numbers(line: Decision | AuditRow) -> list[tuple[str, ...]]:
    """Return the layer numbers of a line's weight, and of every name that is said of it."""
    said = [name for text in (line.detail, line.form_reason) for name in _NAME.findall(text)]
    return [name_numbers(name) for name in (line.name, *said)]


_NAME = re.compile(r"(?<=')\d+(?=')|[\w.]*[A-Za-z_][\w.]*")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def _wild(text: str) -> str:
    """Return a text with every layer number in the names that it holds as ``*``."""
    return _NAME.sub(lambda found: _NUMBER.sub("*", found[0]), text)


def _together(texts: Sequence[str]) -> str:
    """Return texts that differ in layer numbers only as one, the numbers that differ in braces."""
    numbers = [[n for name in _NAME.findall(text) for n in _NUMBER.findall(name)] for text in texts]
    columns = iter(list(zip(*numbers, strict=True)))

    def number(found: re.Match[str]) -> str:
        column = next(columns)
        return found[0] if len(set(column)) == 1 else f"{{{_numbers(column)}}}"

    return _NAME.sub(lambda found: _NUMBER.sub(number, found[0]), texts[0])


def _spoken_for(group: Sequence[_Line]) -> _Line:
    """Return the first line of a group, with what is said of it said of all."""
    detail, reason = (
        _together([getattr(line, text) for line in group]) for text in ("detail", "form_reason")
    )
    return replace(group[0], detail=detail, form_reason=reason)


def _grouped(decisions: Sequence[Decision]) -> list[list[Decision]]:
    return _gathered(
        decisions, lambda d: (d.site.kind, d.site.shape, roles_text(d.site.roles), ranks_text(d))
    )


def _row_key(row: AuditRow) -> tuple[object, ...]:
    return row.kind, row.shape, roles_text(row.roles), row.rank_text, row.delta is None


def _deltas_text(deltas: Sequence[float]) -> str:
    """Return how far weights moved, as one number or the lowest and the highest."""
    ends = dict.fromkeys(f"{d:.3g}" for d in (min(deltas), max(deltas))) if deltas else ()
    return " to ".join(ends)


def name_numbers(name: str) -> tuple[str, ...]:
    """Return the layer numbers in a name."""
    return tuple(_NUMBER.findall(name))


def name_pattern(names: Sequence[str], *, wild: bool = False) -> str:
    """Return names as one, numbers that differ in braces: ``layer.{0-11}.query.weight``.

    With ``wild`` every number becomes ``*``: names that share the result differ in numbers only.
    """
    if wild:
        return re.sub(r"(?<![^.])\d+(?![^.])", "*", names[0])
    columns = list(zip(*(name.split(".") for name in names), strict=True))
    return ".".join(next(iter(c)) if len(set(c)) == 1 else f"{{{_numbers(c)}}}" for c in columns)


def _numbers(column: Sequence[str]) -> str:
    """Return numbers, however often they stand there, as ranges."""
    return ranges_text(sorted({int(value) for value in column}))


def ranges_text(values: Sequence[int]) -> str:
    """Return ascending numbers as ranges: ``0-3,5``."""
    ranges: list[list[int]] = []
    for value in values:
        if ranges and value == ranges[-1][1] + 1:
            ranges[-1][1] = value
        else:
            ranges.append([value, value])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
