"""What is public is documented: every method has a docstring, every room a place in docs/api.md.

Ruff asks for the docstrings of modules, classes and functions; it cannot see that an overriding
method inherits its docstring, so methods are looked at here.
"""

import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import pyro_nf

API = Path(__file__).parents[1] / "docs" / "api.md"
MODULES = [
    "pyro_nf",
    *(module.name for module in pkgutil.walk_packages(pyro_nf.__path__, "pyro_nf.")),
]


def undocumented_methods(module: ModuleType) -> list[str]:
    """The public methods of the module's public classes that have and inherit no docstring."""
    return [
        f"{class_.__name__}.{name}"
        for class_ in vars(module).values()
        if inspect.isclass(class_) and class_.__module__ == module.__name__
        if not class_.__name__.startswith("_")
        for name in vars(class_)
        if not name.startswith("_") and inspect.isroutine(getattr(class_, name))
        if not inspect.getdoc(getattr(class_, name))
    ]


@pytest.mark.parametrize("module", MODULES)
def test_every_public_method_has_a_docstring(module: str) -> None:
    assert not undocumented_methods(importlib.import_module(module))


def test_a_missing_docstring_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("made_up")
    monkeypatch.setitem(sys.modules, "made_up", module)  # where inspect looks for the base class
    source = """
class A:
    def f(self): "F."
class B(A):
    def f(self): ...
    def g(self): ...
    def _h(self): ...
class _C:
    def f(self): ...
"""
    exec(source, vars(module))
    assert undocumented_methods(module) == ["B.g"]


def test_every_public_room_is_in_the_api_page() -> None:
    """A room is public when its face says what it shows."""
    listed = set(re.findall(r"automodule:: (\S+)", API.read_text(encoding="utf-8")))
    rooms = {
        name
        for name in MODULES
        if re.fullmatch(r"pyro_nf\.[a-z]+", name)
        and hasattr(importlib.import_module(name), "__all__")
    }
    assert not rooms - listed, "docs/api.md needs an automodule line for each of these"
