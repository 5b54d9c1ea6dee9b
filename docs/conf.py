"""Sphinx: `make docs` builds the pages of this folder and the API reference from docstrings, into build/docs."""

from __future__ import annotations

from typing import Any

import fastnorm

project = "fastnorm"
copyright = "the fastnorm authors"
version = release = fastnorm.__version__

extensions = ["sphinx.ext.autodoc", "myst_parser"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["Thumbs.db"]
html_theme = "alabaster"
html_theme_options = {
    "description": "Normalization layers for PyTorch that run at memory speed",
    "page_width": "1100px",
}
suppress_warnings = ["myst.xref_missing"]  # links to files outside of this folder are for readers of the repository

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True


def plain_text(app: Any, what: str, name: str, object_: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: asterisks are shapes, and indented lines stay lines."""
    result: list[str] = []
    base = 0
    for line in lines:
        indent = len(line) - len(line.lstrip())
        text = line.strip().replace("*", r"\*")
        if indent == 0:
            result += [""] * (base > 0) + [text]
            base = 0
            continue
        if base == 0:
            base = indent
            result.append("")
        result.append(f"| {text}" if indent == base else f"  {text}")
    lines[:] = result


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", plain_text)
