"""Every public function of `dynamo.kernels` can be used alone: its docstring shows how, and the example runs here."""

import doctest
import importlib
import inspect
import pkgutil
import re
from types import FunctionType, ModuleType

import pytest

import dynamo.kernels

_SUPPORT = re.compile(r"aot|checks|pieces|kernel_call|host_\w+|\w+_host|\w+_kernel|\w*reference\w*")
"""Modules that launchers are made of and tested with; users call none of it."""


def _modules() -> list[ModuleType]:
    names = sorted(module.name for module in pkgutil.iter_modules(dynamo.kernels.__path__))
    return [importlib.import_module(f"dynamo.kernels.{name}") for name in names if not _SUPPORT.fullmatch(name)]


def _functions() -> dict[str, FunctionType]:
    """Functions in `__all__` by full name, each in the module that defines it."""
    found = {}
    for module in _modules():
        for name in getattr(module, "__all__", ()):
            value = inspect.unwrap(getattr(module, name)) if callable(getattr(module, name)) else None
            if isinstance(value, FunctionType) and value.__module__ == module.__name__:
                found[f"{module.__name__}.{name}"] = value
    return found


FUNCTIONS = _functions()


@pytest.mark.parametrize("module", _modules(), ids=lambda module: module.__name__)
def test_public_names_are_listed(module: ModuleType) -> None:
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert hasattr(module, name), f"{module.__name__}.__all__ names {name}, which is not there"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_of_each_public_function_runs(name: str) -> None:
    function = FUNCTIONS[name]
    module = importlib.import_module(function.__module__)
    names = {public: getattr(module, public) for public in module.__all__}  # as after `from module import *`
    tests = doctest.DocTestFinder(recurse=False).find(function, name, globs=names)
    examples = [test for test in tests if test.examples]
    assert examples, f"{name} has no example in its docstring: add an `Example:` section with >>> lines"
    for test in examples:
        said: list[str] = []
        outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
        assert outcome.failed == 0, "".join(said)
