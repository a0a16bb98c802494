"""The demo model's training text: the docstrings of the running Python's standard library.

Sources are parsed, never imported, except for the modules compiled into the interpreter, whose docstrings exist only at
run time. The text is © Python Software Foundation, PSF License Version 2.
"""

import ast
import inspect
import random
import sys
import sysconfig
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

__all__ = ["Entry", "collect_entries", "render_documents"]

SKIPPED_PACKAGES = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "turtledemo"}
MIN_DOC_CHARS = 24
QUESTIONS = (
    "What does {name} do?",
    "Explain {name}.",
    "Describe {name}",
    "How do I use {name}?",
    "{name}",
    "Tell me about {name}",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One documented object: its dotted name, its call signature or "", and its cleaned docstring."""

    name: str
    signature: str
    doc: str


def _walk_ast(node: ast.AST, prefix: str) -> Iterator[Entry]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name = f"{prefix}.{child.name}"
        signature = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
        if doc := ast.get_docstring(child):
            yield Entry(name, signature, doc)
        yield from _walk_ast(child, name)


def _source_entries(stdlib: Path) -> Iterator[Entry]:
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if SKIPPED_PACKAGES & set(parts):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # a few stdlib files are deliberately malformed test input
        if doc := ast.get_docstring(tree):
            yield Entry(module, "", doc)
        yield from _walk_ast(tree, module)


def _builtin_entries() -> Iterator[Entry]:
    for module_name in sorted(sys.builtin_module_names):
        module = __import__(module_name)
        for name, value in sorted(vars(module).items()):
            if name.startswith("_"):
                continue
            doc = inspect.getdoc(value) if callable(value) else None
            prefix = name if module_name == "builtins" else f"{module_name}.{name}"
            if doc:
                yield Entry(prefix, "", doc)
            if isinstance(value, type):
                for method_name, method in sorted(vars(value).items()):
                    if not method_name.startswith("_") and isinstance(
                        method, types.MethodDescriptorType | types.BuiltinMethodType
                    ):
                        yield Entry(f"{prefix}.{method_name}", "", inspect.getdoc(method) or "")


def collect_entries() -> list[Entry]:
    """Every documented object of the standard library and the language reference's help topics, in a fixed order.

    Duplicate docstrings are kept once, so that inherited boilerplate is not learnt by heart.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    entries: list[Entry] = []
    seen: set[str] = set()
    for entry in (*_source_entries(stdlib), *_builtin_entries()):
        if len(entry.doc) >= MIN_DOC_CHARS and entry.doc not in seen:
            seen.add(entry.doc)
            entries.append(entry)
    for topic, text in sorted(topics.items()):
        entries.append(Entry(topic, "", inspect.cleandoc(text).replace("*", "").replace("“", '"').replace("”", '"')))
    return entries


def render_documents(entries: list[Entry], rng: random.Random) -> Iterator[str]:
    """One training document an entry: most as question and answer in the chat format, the others as plain reference text."""
    for entry in entries:
        if rng.random() < 0.6:
            question = rng.choice(QUESTIONS).format(name=entry.name)
            yield f"<|user|>{question}<|assistant|>{entry.doc}<|end|>"
        else:
            yield f"{entry.name}{entry.signature}\n\n{entry.doc}<|end|>"
