"""Griffe extension: the reStructuredText roles and formulas of the docstrings as Markdown.

A role such as ``:class:`~harness.metrics.Values``` becomes a link shown as ``Values``, ``:math:`x``` becomes ``$x$``
and a ``.. math::`` block becomes one between ``$$``. Example sections become Examples, which know doctests.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr|exc):`(~?)([\w.]+)`")
_INLINE_MATH = re.compile(r":math:`([^`]+)`", re.DOTALL)
_MATH = re.compile(r"^([ ]*)\.\. math::[ ]*(.*)\n((?:(?:\1[ ]+.*)?\n)*(?:\1[ ]+.*)?)", re.MULTILINE)


def to_markdown(text: str) -> str:
    """Markdown of a docstring."""
    text = _MATH.sub(_formula, text)
    text = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    text = _INLINE_MATH.sub(lambda match: f"${' '.join(match[1].split())}$", text)
    return _ROLE.sub(_reference, text)


def _formula(match: re.Match[str]) -> str:
    indent, first, rest = match[1], match[2], textwrap.dedent(match[3]).strip()
    formula = "\n".join(line for line in (first.strip(), rest) if line)
    return f"{textwrap.indent(f'$${chr(10)}{formula}{chr(10)}$$', indent)}\n\n"


def _reference(match: re.Match[str]) -> str:
    tilde, target = match[1], match[2]
    shown = target.rpartition(".")[2] if tilde else target
    return f"[`{shown}`][{target}]" if target.startswith("harness.") else f"`{shown}`"


class RstDocstrings(Extension):
    """Rewrites docstrings as they are collected."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value + "\n").rstrip()
