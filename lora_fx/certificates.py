"""Certificates: what was proven about a folded ONNX file against its base, check by check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table

from lora_fx.errors import CertificateError
from lora_fx.tables import as_text

CERTIFICATE_VERSION = 1


@dataclass(frozen=True)
class Check:
    """One proven or refuted statement.

    ``name`` says which statement (``structure``, ``changed-set``, ``delta``, ...); ``detail`` what was
    found, with figures; ``place`` where it failed (a node, a value, an initializer), or "" where it
    holds everywhere. ``data`` carries the figures for programs.
    """

    name: str
    ok: bool
    detail: str
    place: str = ""
    data: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, read back by ``Certificate.from_json``."""
        return {**vars(self), "data": dict(self.data)}


@dataclass(frozen=True)
class Certificate:
    """The checks made on a pair of ONNX files; ``ok`` when every one of them holds.

    ``base`` and ``folded`` are file names; ``environment`` the versions, provider and options under
    which the checks ran; ``notes`` say what was not checked, and why.
    """

    base: str
    folded: str
    checks: tuple[Check, ...]
    environment: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there are checks, and all of them hold."""
        return bool(self.checks) and all(check.ok for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that do not hold."""
        return tuple(check for check in self.checks if not check.ok)

    def __getitem__(self, name: str) -> Check:
        """Return the check of this name.

        Raises:
            KeyError: no such check was made.
        """
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        """Say whether a check of this name was made."""
        return any(check.name == name for check in self.checks)

    def raise_for_failure(self) -> Certificate:
        """Return itself where every check holds.

        Raises:
            CertificateError: a check failed; the message names the first one and its place.
        """
        if self.ok:
            return self
        if not self.checks:
            raise CertificateError(
                self.folded, expected="a certificate with checks", got="none", advice="Run certify again."
            )
        first = self.failures[0]
        others = ", ".join(check.name for check in self.failures[1:])
        raise CertificateError(
            f"{self.folded}: {first.place}" if first.place else self.folded,
            expected=f"the check {first.name!r} against {self.base} to hold",
            got=first.detail,
            advice="Do not ship this file; export or fold it again."
            + (f" Failed too: {others}." if others else ""),
        )

    def noted(self, *notes: str) -> Certificate:
        """Return the certificate with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def to_json(self) -> str:
        """Return the certificate as JSON text; ``Certificate.from_json`` reads it back equal."""
        data = {
            "certificate_version": CERTIFICATE_VERSION,
            "ok": self.ok,
            "base": self.base,
            "folded": self.folded,
            "environment": dict(self.environment),
            "notes": list(self.notes),
            "checks": [check.to_json() for check in self.checks],
        }
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """Read what ``to_json`` wrote.

        Raises:
            CertificateError: the text is not a certificate, or of another version.
        """
        try:
            data = json.loads(text)
            if data["certificate_version"] != CERTIFICATE_VERSION:
                raise ValueError(f"certificate_version {data['certificate_version']}")
            return cls(
                base=data["base"],
                folded=data["folded"],
                checks=tuple(Check(**check) for check in data["checks"]),
                environment=data["environment"],
                notes=tuple(data["notes"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CertificateError(
                "the certificate",
                expected=f"JSON written by Certificate.to_json, version {CERTIFICATE_VERSION}",
                got=f"{type(error).__name__}: {error}",
                advice="Pass the text of a saved certificate.",
            ) from error

    def _subject(self) -> str:
        """Say what was examined: a base's own export, or a pair of files."""
        if self.base == self.folded and {check.name for check in self.checks} <= {"parity", "runtime"}:
            return f"Export of {self.folded}"
        pair = f"Certificate of {self.folded} against {self.base}"
        # The check that lists what differs, where there is no adapter that says what should.
        return f"{pair}, no adapter given" if "changed" in self else pair

    def table(self) -> Table:
        """Return the certificate as a rich table."""
        verdict = "[bold green]holds[/]" if self.ok else "[bold red]FAILS[/]"
        table = Table(title=f"{self._subject()}: {verdict}")
        table.add_column("check", no_wrap=True)
        table.add_column("")
        table.add_column("found")
        for check in self.checks:
            mark = "[green]ok[/]" if check.ok else "[red]FAIL[/]"
            found = f"{check.place}: {check.detail}" if check.place else check.detail
            table.add_row(check.name, mark, escape(found))
        if self.notes:
            table.caption = escape("\n".join(self.notes))
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Print as a table where rich prints."""
        yield self.table()

    def __str__(self) -> str:
        """Return the table as plain text."""
        return as_text(self.table())
