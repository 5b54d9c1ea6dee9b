"""The Python blocks of README.md run, in order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run() -> None:
    text = README.read_text()
    namespace: dict[str, Any] = {"__name__": "readme"}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert blocks
    for block in blocks:
        # So that a traceback shows README's own line numbers.
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(README), "exec"), namespace)
