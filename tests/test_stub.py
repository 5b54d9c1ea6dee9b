"""fastnorm/_C.pyi and fastnorm._C agree both ways: names, signatures, attributes, constants, types."""

from __future__ import annotations

import ast
import re
import textwrap
import types
from pathlib import Path

import pytest

from fastnorm import _C

STUB = ast.parse((Path(__file__).resolve().parent.parent / "fastnorm" / "_C.pyi").read_text())
INTEGERS = "typing.SupportsInt | typing.SupportsIndex"  # pybind11 prints this for an int parameter
FLOATS = "typing.SupportsFloat | typing.SupportsIndex"

# A function's signature; "-> type" of a property or a constant; a class's members.
Described = str | dict[str, str]


# Both sides come to one form: the signature as Python writes it, without the type of self.


def signature(function: ast.FunctionDef) -> str:
    if function.args.args and function.args.args[0].arg == "self":
        function.args.args[0].annotation = None
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"({ast.unparse(function.args)}){returns}"


def parse_one(text: str) -> ast.FunctionDef:
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef)
    return function


# The stub.


def described_by_stub(body: list[ast.stmt]) -> dict[str, Described]:
    found: dict[str, Described] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            assert node.name not in found
            if any(ast.unparse(decorator) == "property" for decorator in node.decorator_list):
                assert node.returns is not None
                found[node.name] = f"-> {ast.unparse(node.returns)}"
            else:
                found[node.name] = signature(node)
        elif isinstance(node, ast.ClassDef):
            members = described_by_stub(node.body)
            found[node.name] = {name: text for name, text in members.items() if isinstance(text, str)}
        elif isinstance(node, ast.AnnAssign):
            found[ast.unparse(node.target)] = f"-> {ast.unparse(node.annotation)}"
        else:
            assert isinstance(node, (ast.ImportFrom, ast.Expr)), ast.unparse(node)
    return found


# The extension: the first line of pybind11's docstring is the signature.


def described_by_docstring(doc: str, name: str) -> str:
    first = doc.strip().splitlines()[0]
    assert "Overloaded function" not in doc, f"{name} has overloads, which this test does not know"
    for theirs, ours in ((INTEGERS, "int"), (FLOATS, "float"), ("fastnorm._C.", ""), ("collections.abc.", "")):
        first = first.replace(theirs, ours)
    return signature(parse_one(f"def {name}{first.removeprefix(name)}: ..."))


def described_by_class(cls: type) -> dict[str, str]:
    found = {}
    for name, member in vars(cls).items():
        if isinstance(member, property):
            text = described_by_docstring(member.fget.__doc__ or "", "get")
            found[name] = text[text.index("->") :] + " (writable)" * (member.fset is not None)
        elif isinstance(member, types.WrapperDescriptorType):
            continue  # the slot of a class without a constructor
        elif name == "__init__" or not name.startswith("_"):
            if callable(member):
                found[name] = described_by_docstring(member.__doc__ or "", name)
            else:
                found[name] = f"-> {type(member).__name__}"
    return found


def described_by_extension(name: str) -> Described:
    value = getattr(_C, name)
    if isinstance(value, type):
        return described_by_class(value)
    return described_by_docstring(value.__doc__, name) if callable(value) else f"-> {type(value).__name__}"


STUBBED = described_by_stub(STUB.body)
PUBLIC = sorted({name for name in dir(_C) if not name.startswith("_")} | set(STUBBED))


@pytest.mark.parametrize("name", PUBLIC)
def test_stub_is_the_extension(name: str) -> None:
    assert name in STUBBED, f"_C.pyi has no {name}"
    assert hasattr(_C, name), f"_C has no {name}"
    assert STUBBED[name] == described_by_extension(name)


def test_stub_is_read() -> None:
    text = """
        SIZE: int
        def f(a: int, b: str = "x", *, c: bool = False) -> list[str]: ...
        class A:
            def __init__(self, n: int) -> None: ...
            @property
            def n(self) -> float: ...
    """
    assert described_by_stub(ast.parse(textwrap.dedent(text)).body) == {
        "SIZE": "-> int",
        "f": "(a: int, b: str='x', *, c: bool=False) -> list[str]",
        "A": {"__init__": "(self, n: int) -> None", "n": "-> float"},
    }


def test_docstrings_are_read() -> None:
    doc = f"f(a: {INTEGERS}, g: fastnorm._C.Grid, *, b: collections.abc.Mapping[str, {FLOATS}] = {{}}) -> None\n\nWhy."
    assert described_by_docstring(doc, "f") == "(a: int, g: Grid, *, b: Mapping[str, float]={}) -> None"


def test_every_function_has_a_word_in_the_stub() -> None:
    """Editors show the stub's docstrings."""
    for node in STUB.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert re.search(r"\w", ast.get_docstring(node) or ""), node.name
