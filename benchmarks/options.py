"""Values of command lines, checked before anything is measured: types for argparse. Errors say what was expected."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from tests.common.cases import LAYOUTS

Number = TypeVar("Number", int, float)


def positive(kind: Callable[[str], Number], text: str) -> Number:
    """A number above zero."""
    try:
        value = kind(text)
    except ValueError:
        value = kind("0")
    if not value > 0:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r}, expected {what} above 0")
    return value


def choices(names: Sequence[str], text: str) -> tuple[str, ...]:
    """Some of `names`, with commas between; each once."""
    given = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [name for name in given if name not in names]
    if unknown or not given:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}, expected some of {', '.join(names)}")
    return given


def regex(text: str) -> str:
    """A regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


def memory_format(text: str) -> str:
    """One of cases.LAYOUTS; torch calls the first of them contiguous."""
    name = "planar" if text == "contiguous" else text
    if name not in LAYOUTS:
        raise argparse.ArgumentTypeError(f"{text!r}, expected {' or '.join(LAYOUTS)}")
    return name


def image(text: str) -> Path:
    """The path of a picture, with a suffix that matplotlib can write."""
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if Path(text).suffix.removeprefix(".").lower() not in kinds:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a path that ends in .{', .'.join(kinds)}")
    return Path(text)
