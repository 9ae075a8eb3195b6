"""Docstrings as mkdocstrings reads them: an extension of Griffe, used by ``make docs``."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?(?:[\w.]+\.)?(\w+)`")


class Docstrings(griffe.Extension):
    """Makes ``Example:`` the section that Griffe calls ``Examples:``, and Sphinx's references plain names."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object that was read."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = _ROLE.sub(r"`\1`", text)
