"""Triton kernels without a GPU: run through the interpreter, or compiled ahead of time and read as machine code.

Both live in one process; the environment variable TRITON_INTERPRET stays unset and nothing is needed at import time.

`interpreted(kernel)` returns a drop-in replacement of a `@triton.jit` kernel that runs on CPU tensors and on integer
addresses of host memory, launched the same way: `interpreted(kernel)[grid](*args, num_warps=8)`; options such as
`num_warps` are ignored. To run a launcher through it, replace the kernel where the launcher looks it up:

    monkeypatch.setattr(copy_kernel, "copy_kernel", interpreted(copy_kernel.copy_kernel))

How it works. `triton.jit` chooses between compiling and interpreting when a function is *defined*; so the function is
taken out of the JIT object and wrapped again. Device functions it calls are names in its globals, and the standard
library of Triton (`tl.sum`, `tl.cdiv`, `tl.zeros`, ...) is made of such functions too. Therefore:

    - a kernel is rebuilt over a *copy* of its globals in which every JIT function is interpreted, recursively: the module
      under test is not touched, and the interpreter's own names do not leak into it
    - for the duration of one launch the JIT functions in `triton.language` are replaced, and `knobs.runtime.interpret` set
    - afterwards every attribute of `triton.language` is put back as it was; Triton's own restore misses what nested calls
      patch, and the next ahead-of-time compilation would fail

One launch at a time: the replacement is process-wide while it lasts. Casts are not exact there (fp32 to bf16 truncates,
fp32 to fp8 rounds differently); compare with a tolerance, or round in integer arithmetic.

`aot(kernel, signature, constexprs, ...)` is `dynamo.kernels.aot.compile_kernel`: registers, spills and access widths for
one architecture. What a kernel module lists in `specializations() -> list[dynamo.kernels.aot.Specialization]` is compiled
and checked by `test_aot.py` without a further test. Both fixtures skip the test where Triton is not installed.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import pytest

Interpret = Callable[[Any], Any]


class _Interpreter:
    """Interpreted twins of JIT functions, made once per function."""

    def __init__(self) -> None:
        import triton.language as tl
        from triton import knobs
        from triton.runtime import interpreter, jit

        self._tl, self._knobs, self._interpreter, self._jit = tl, knobs, interpreter, jit
        self._twins: dict[int, Any] = {}
        self._active = False
        modules = [tl, tl.core, tl.math, tl.standard, tl.random]
        classes = [tl.tensor, tl.condition, tl.dtype, tl.core.tensor_descriptor_base]
        self._patched: list[ModuleType | type] = [*modules, *classes]

    def __call__(self, kernel: Any) -> Any:
        """The launchable twin of `kernel`, a JIT function."""
        if not isinstance(kernel, self._jit.JITFunction):
            raise TypeError(f"interpreted() takes a @triton.jit function, got {type(kernel).__name__}")
        return _Launchable(self, self._twin(kernel))

    @contextmanager
    def session(self) -> Iterator[None]:
        """Turns `triton.language` into the interpreter's for the block. Re-entrant."""
        if self._active:
            yield
            return
        before = [(owner, dict(vars(owner))) for owner in self._patched]
        self._active = True
        try:
            with self._knobs.runtime.scope():
                self._knobs.runtime.interpret = True
                self._replace_library()
                yield
        finally:
            self._active = False
            for owner, attributes in before:
                _restore(owner, attributes)

    def _replace_library(self) -> None:
        for owner in self._patched:
            for name, value in list(vars(owner).items()):
                if not isinstance(value, self._jit.JITFunction):
                    continue
                twin = self._twin(value)
                # A plain function becomes a method of tl.tensor; an object would lose its self.
                setattr(owner, name, _as_method(twin) if isinstance(owner, type) else twin)

    def _twin(self, function: Any) -> Any:
        known = self._twins.get(id(function))
        if known is not None:
            return known
        plain = function.fn
        scope = dict(plain.__globals__)
        copy = FunctionType(plain.__code__, scope, plain.__name__, plain.__defaults__, plain.__closure__)
        copy.__kwdefaults__, copy.__annotations__ = plain.__kwdefaults__, plain.__annotations__
        copy.__module__, copy.__qualname__ = plain.__module__, plain.__qualname__
        twin = self._interpreter.InterpretedFunction(copy)
        self._twins[id(function)] = twin  # before its callees: functions may call each other in a circle
        for name in inspect.getclosurevars(plain).globals:
            if isinstance(scope[name], self._jit.JITFunction):
                scope[name] = self._twin(scope[name])
        return twin


class _Launchable:
    """`kernel[grid](...)` inside an interpreter session."""

    def __init__(self, interpreter: _Interpreter, twin: Any) -> None:
        self._interpreter, self._twin = interpreter, twin
        self.fn, self.arg_names = twin.fn, twin.arg_names

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            with self._interpreter.session():
                self._twin[grid](*args, **kwargs)

        return launch


def _as_method(twin: Any) -> Callable[..., Any]:
    def method(*args: Any, **kwargs: Any) -> Any:
        return twin(*args, **kwargs)

    return method


def _restore(owner: ModuleType | type, attributes: dict[str, Any]) -> None:
    for name, value in list(vars(owner).items()):
        if name not in attributes:
            delattr(owner, name)
        elif value is not attributes[name]:
            setattr(owner, name, attributes[name])
    for name in attributes.keys() - vars(owner).keys():
        setattr(owner, name, attributes[name])


@pytest.fixture(scope="session")
def interpreted() -> Interpret:
    """`interpreted(kernel)`: the kernel, run by Triton's interpreter on CPU memory. See this module's docstring."""
    pytest.importorskip("triton", reason="needs Triton")
    return _Interpreter()


@pytest.fixture(scope="session")
def aot() -> Callable[..., Any]:
    """`dynamo.kernels.aot.compile_kernel`, for sm_80, sm_90 and sm_100 without a GPU."""
    pytest.importorskip("triton", reason="needs Triton")
    from dynamo.kernels.aot import compile_kernel

    return compile_kernel
