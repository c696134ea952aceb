"""What every weight of many architectures does, written by hand from their sources.

One text per architecture; each line names weights by a glob over their qualified name (without a final
``.weight``) and says what they do; the first line that matches counts, and a weight that none matches
does nothing that has a name::

    *.qkv = q[0:32] k[32:64] v[64:96]     rows of a fused weight
    *.qkv = q[0:8/24] k[8:16/24]          rows 0 to 8 of every 24: interleaved by head
    *.fc1 = -                             nothing
    cross *.kv                            looks from one stream at another (a remark)
    position *.rel                        carries positions into an attention (a remark)
    ? *.gate = gate                       a line of a family's text that need not match

A role is what a weight does, whatever its source calls it: ``v`` is what the probabilities weigh,
``gate`` what goes through the activation of a gated unit.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_fx.matrix import Rows
from lora_fx.sites import ROLES, Site
from tests.zoo.roles_models import Builder


@dataclass(frozen=True)
class Truth:
    """One architecture: how it is built and what its weights do."""

    name: str
    build: Builder
    text: str

    def roles(self, site: Site) -> dict[str, Rows | None]:
        """Return what a site does."""
        for pattern, said in self._lines():
            if _matches(pattern, site.name):
                return {} if said == "-" else dict(_role(word, site) for word in said.split())
        return {}

    def remarked(self, kind: str, site: Site) -> bool:
        """Say whether a site is to be remarked on as ``cross`` or ``position``."""
        return any(_matches(pattern, site.name) for pattern in self._remarks(kind))

    def unused(self, sites: Iterable[Site]) -> list[str]:
        """Return the patterns that match no site: slips in the text."""
        names = [site.name for site in sites]
        patterns = [line.partition("=")[0].strip() for line in self._said() if "=" in line]
        patterns += [p for kind in ("cross", "position") for p in self._remarks(kind)]
        return [p for p in patterns if p[0] != "?" and not any(_matches(p, name) for name in names)]

    def _lines(self) -> list[tuple[str, str]]:
        lines = [line.partition("=") for line in self._said()]
        return [(left.strip("? "), right.strip()) for left, sign, right in lines if sign]

    def _said(self) -> list[str]:
        return [line.partition("#")[0] for line in self.text.splitlines()]

    def _remarks(self, kind: str) -> list[str]:
        return [line.split()[1] for line in self._said() if line.split()[:1] == [kind]]


def _matches(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name.removesuffix(".weight"), pattern)


def _role(word: str, site: Site) -> tuple[str, Rows | None]:
    role, bracket, inside = word.partition("[")
    if role not in ROLES:
        raise ValueError(f"no role: {word!r}")
    if not bracket:
        return role, None
    ranges: list[tuple[int, int]] = []
    for piece in inside.rstrip("]").split(","):
        read = re.fullmatch(r"(\d+):(\d+)/?(\d*)", piece)
        if read is None:
            raise ValueError(f"no rows: {word!r}")
        start, stop, period = (int(n or 0) for n in read.groups())
        count = site.form.out_features // period if period else 1
        ranges += [(start + i * period, stop + i * period) for i in range(count)]
    return role, _merged(sorted(ranges))


def _merged(ranges: list[tuple[int, int]]) -> Rows:
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def truths(texts: Mapping[str, tuple[Builder, str]]) -> tuple[Truth, ...]:
    """Return the architectures of one table."""
    return tuple(Truth(name, build, text) for name, (build, text) in texts.items())
