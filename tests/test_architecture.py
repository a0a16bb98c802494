"""The house's walls: which package may import which, and what every module owes its readers.

Each rule is a function that takes a source tree and returns violations as text, so that the control cases below can
show it failing on a tree that breaks the rule.
"""

import ast
import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("kernels", "tiers", "kvcache", "router", "serve", "perf")

# What each layer may import of the others: kvcache stands on tiers and kernels, serve on kvcache and router.
# A dotted entry allows that module only; perf may import anything.
ALLOWED: dict[str, tuple[str, ...]] = {
    "kernels": (),
    "tiers": ("kernels",),
    "kvcache": ("tiers", "kernels"),
    "router": ("kvcache.hashing", "kvcache.events", "kvcache.event_wire"),
    "serve": ("router", "kvcache", "kernels.paged_attention", "kernels.paged_proof"),
    "perf": (*LAYERS, "_core"),  # ai-dynamo's, by the script that times it in an interpreter of its own
}
# The router, and what it and a front process load of the cache.
TORCH_FREE = ("router", "kvcache.hashing", "kvcache.events", "kvcache.event_wire", "kvcache.event_publisher")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yml", ".yaml", ".sh", ".in", ".cfg", ".txt", ".ipynb"}
SKIPPED_FOLDERS = {".git", ".namespace", "__pycache__", "build", "dist"}
# Written in pieces, or this file would be the first to break its own rule.
MACHINE_PATHS = re.compile(r"(?<![\w.])/" + r"(?:root/|home/[a-z]|Users/|work/)" + r"|\.\./" + "shared")


@functools.cache
def parsed(source: str) -> ast.Module:
    """Of a module; several rules look at the same ones."""
    return ast.parse(source)


def modules(tree: Path, layers: tuple[str, ...] = LAYERS) -> Iterator[tuple[str, Path]]:
    """(dotted name below `dynamo.`, file) of every module of the layers under `tree`."""
    for layer in layers:
        for path in sorted((tree / layer).rglob("*.py")):
            parts = path.relative_to(tree).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of all imports: at the top, under TYPE_CHECKING, inside functions, and by name.

    `from a import b` gives "a.b", which is right whether b is a module or an attribute of one. A relative import gives
    a name with leading dots.
    """
    for node in ast.walk(parsed(path.read_text())):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom():
                source = "." * node.level + (node.module or "")
                yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def is_below(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def direction_violations(tree: Path) -> list[str]:
    """Imports that run against the arrows, and relative or bare-name imports of a layer."""
    found = []
    for module, path in modules(tree):
        layer = module.split(".")[0]
        allowed = (layer, *ALLOWED[layer])
        for line, name in imported_names(path):
            if name.startswith(".") or any(is_below(name, other) for other in LAYERS):
                found.append(f"{module}:{line} imports {name}; write dynamo.<package> in full")
            elif is_below(name, "dynamo"):
                target = name.removeprefix("dynamo").lstrip(".")
                if not any(is_below(target, entry) for entry in allowed):
                    found.append(f"{module}:{line} imports {name}; {layer} may import only {', '.join(allowed)}")
    return found


def torch_violations(tree: Path) -> list[str]:
    """Imports of torch in modules that a router loads."""
    return [
        f"{path.relative_to(tree)}:{line} imports {name}"
        for module, path in modules(tree)
        if any(is_below(module, free) for free in TORCH_FREE)
        for line, name in imported_names(path)
        if is_below(name, "torch")
    ]


def all_violations(tree: Path) -> list[str]:
    """Public modules without `__all__`. A package that defines nothing needs none; nor does `__main__`."""
    found = []
    for module, path in modules(tree):
        if module.rpartition(".")[2].startswith("_"):
            continue
        body = parsed(path.read_text()).body
        defines = any(
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom)
            for node in body
        )
        targets = [t for node in body if isinstance(node, ast.Assign) for t in node.targets]
        targets += [node.target for node in body if isinstance(node, ast.AnnAssign)]
        exported = any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)
        if not exported and (defines or path.name != "__init__.py"):
            found.append(f"{module} has no __all__")
    return found


def export_violations(tree: Path) -> list[str]:
    """Names taken from a module of ours that its `__all__` does not offer; submodules excepted."""
    own = dict(modules(tree))
    found = []
    for module, path in own.items():
        for node in ast.walk(parsed(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not is_below(node.module or "", "dynamo"):
                continue
            source = (node.module or "").removeprefix("dynamo").lstrip(".")
            if source in own:
                offered = exported_names(own[source])
                names = [alias.name for alias in node.names if f"{source}.{alias.name}" not in own]
                found += [f"{module}:{node.lineno} takes {name} from {source}" for name in names if name not in offered]
    return found


def exported_names(path: Path) -> set[str]:
    """What `__all__` lists."""
    for node in parsed(path.read_text()).body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id="__all__")], value=value)
                | ast.AnnAssign(target=ast.Name(id="__all__"), value=ast.expr() as value)
            ):
                return set(ast.literal_eval(value))
    return set()


def machine_path_violations(tree: Path) -> list[str]:
    """Text that only makes sense on the machine it was written on."""
    found = []
    for path in sorted(tree.rglob("*")):
        parts = path.relative_to(tree).parts
        if any(part in SKIPPED_FOLDERS or part.endswith((".egg-info", "_cache")) for part in parts):
            continue
        if (path.suffix not in TEXT_SUFFIXES and parts[0] != ".ci") or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if match := MACHINE_PATHS.search(line):
                found.append(f"{path.relative_to(tree)}:{number} contains {match[0]!r}")
    return found


def python(code: str, *flags: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=60, cwd=cwd, check=False
    )


# --- the rules, on this repository


def test_imports_run_one_way() -> None:
    assert direction_violations(ROOT) == []


def test_what_a_router_loads_names_no_torch() -> None:
    assert torch_violations(ROOT) == []


# A worker loads its model late, so that what is wrong with its settings is told at once.
@pytest.mark.parametrize("loaded", [TORCH_FREE, ("serve.front_process", "serve.worker")], ids=["router", "processes"])
def test_torch_is_not_brought_in_at_run_time(loaded: tuple[str, ...]) -> None:
    names = ", ".join(f"dynamo.{m}" for m, _ in modules(ROOT) if any(is_below(m, parent) for parent in loaded))
    done = python(f'import sys, {names}; print(sorted(m for m in sys.modules if m.split(".")[0] == "torch"))', "-P")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_all_layers_share_one_parent_directory() -> None:
    """NVIDIA's ai-dynamo also installs a `dynamo.router`; this fails when theirs is the one that is imported."""
    parents = {}
    for layer in LAYERS:
        file = importlib.import_module(f"dynamo.{layer}").__file__
        assert file is not None, f"dynamo.{layer} is a namespace, so it is not ours"
        parents[layer] = Path(file).resolve().parent.parent
    assert len(set(parents.values())) == 1, parents


@pytest.mark.parametrize("layer", LAYERS)
def test_a_package_refuses_its_bare_name(layer: str) -> None:
    done = python(f"import {layer}", cwd=ROOT)
    assert done.returncode == 1
    assert f"ImportError: this package is dynamo.{layer}, imported as '{layer}'" in done.stderr


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_checks_its_name_before_it_does_anything_else(layer: str) -> None:
    body = ast.parse((ROOT / layer / "__init__.py").read_text()).body
    working = [node for node in body[1:] if not isinstance(node, ast.Import | ast.ImportFrom)]
    assert ast.unparse(working[0]).startswith(f"if __name__ != 'dynamo.{layer}':\n    raise ImportError(")


def test_every_public_module_has_all() -> None:
    assert all_violations(ROOT) == []


@pytest.mark.parametrize("module", [m for m, _ in modules(ROOT) if not m.rpartition(".")[2].startswith("_")])
def test_all_names_what_exists(module: str) -> None:
    loaded = importlib.import_module(f"dynamo.{module}")
    exported: list[str] = getattr(loaded, "__all__", [])
    missing = [name for name in exported if not hasattr(loaded, name)]
    assert missing == []
    assert len(set(exported)) == len(exported)


def test_modules_take_from_one_another_only_what_is_offered() -> None:
    assert export_violations(ROOT) == []


def test_no_text_refers_to_the_machine_it_was_written_on() -> None:
    assert machine_path_violations(ROOT) == []


# --- control cases: every rule fails on a tree that breaks it


def write(tree: Path, file: str, source: str) -> None:
    path = tree / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)


UPWARD = {
    "plain": "import dynamo.serve",
    "from module": "from dynamo.serve.config import Settings",
    "from namespace": "from dynamo import serve",
    "for types only": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dynamo.serve import config",
    "inside a function": "def f():\n    import dynamo.serve.config",
    "by name": 'import importlib\nm = importlib.import_module("dynamo.serve")',
    "by __import__": 'm = __import__("dynamo.serve")',
    "relative": "from ..serve import config",
    "bare": "import serve",
}


@pytest.mark.parametrize("source", UPWARD.values(), ids=UPWARD.keys())
def test_control_an_upward_import_is_found(tmp_path: Path, source: str) -> None:
    write(tmp_path, "tiers/host.py", source)
    violations = direction_violations(tmp_path)
    assert len(violations) == 1
    assert violations[0].startswith("tiers.host:")


@pytest.mark.parametrize(
    ("file", "source", "is_allowed"),
    [
        ("router/index.py", "from dynamo.kvcache.hashing import block_keys", True),
        ("router/index.py", "from dynamo.kvcache import events", True),
        ("router/index.py", "from dynamo.kvcache.pool import BlockPool", False),
        ("router/index.py", "from dynamo.kvcache import KVCache", False),
        ("router/index.py", "import dynamo.kvcache", False),
        ("router/index.py", "from dynamo.tiers import layout", False),
        ("serve/app.py", "from dynamo.kvcache import KVCache", True),
        ("serve/app.py", "from dynamo.tiers import layout", False),
        ("serve/app.py", "from dynamo.perf import harness", False),
        ("kvcache/cache.py", "from dynamo.router import index", False),
        ("kernels/copy.py", "from dynamo.tiers import layout", False),
        ("perf/store.py", "from dynamo.tiers import layout", True),
        ("kernels/copy.py", "import dynamic, serverless, torch.nn", True),
    ],
)
def test_control_the_arrows_are_as_drawn(tmp_path: Path, file: str, source: str, is_allowed: bool) -> None:
    write(tmp_path, file, source)
    assert (direction_violations(tmp_path) == []) is is_allowed


@pytest.mark.parametrize("file", ["router/score.py", "kvcache/hashing.py", "kvcache/events.py"])
def test_control_torch_is_found(tmp_path: Path, file: str) -> None:
    write(tmp_path, file, "def f():\n    from torch import Tensor")
    assert torch_violations(tmp_path) == [f"{file}:2 imports torch.Tensor"]


def test_control_a_module_without_all_is_found(tmp_path: Path) -> None:
    write(tmp_path, "tiers/__init__.py", '"""Empty."""')
    write(tmp_path, "tiers/_private.py", "x = 1")
    write(tmp_path, "tiers/good.py", "__all__: list[str] = []")
    write(tmp_path, "tiers/bad.py", "def f(): ...")
    write(tmp_path, "kvcache/__init__.py", "from dynamo.tiers import good")
    assert all_violations(tmp_path) == ["tiers.bad has no __all__", "kvcache has no __all__"]


def test_control_a_name_that_is_not_offered_is_found(tmp_path: Path) -> None:
    write(tmp_path, "tiers/__init__.py", "")
    write(tmp_path, "tiers/disk.py", '__all__ = ["Disk"]\nclass Disk: ...\ndef inner(): ...')
    write(tmp_path, "kvcache/cache.py", "from dynamo.tiers import disk\nfrom dynamo.tiers.disk import Disk, inner")
    assert export_violations(tmp_path) == ["kvcache.cache:2 takes inner from tiers.disk"]


@pytest.mark.parametrize("line", ["see /" + "work/x", "/" + "home/ann/kv", "../" + "shared/y", "/" + "root/v"])
def test_control_a_machine_path_is_found(tmp_path: Path, line: str) -> None:
    write(tmp_path, "serve/README.md", f"ok\n{line}\n")
    write(tmp_path, ".git/config.py", line)
    write(tmp_path, "serve/homework/ok.py", "x = 'home/work/'")
    assert len(machine_path_violations(tmp_path)) == 1


def test_control_a_foreign_router_beside_ours_is_noticed(tmp_path: Path) -> None:
    """A `dynamo.router` found earlier on the path, as with ai-dynamo installed, does not share our parent directory."""
    write(tmp_path, "dynamo/router/__init__.py", "")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import dynamo.kvcache, dynamo.router, pathlib; "
        "print(*(pathlib.Path(m.__file__).resolve().parent.parent for m in (dynamo.kvcache, dynamo.router)), sep='|')"
    )
    done = python(code, "-P")
    assert done.returncode == 0, done.stderr
    ours, theirs = done.stdout.strip().split("|")
    assert ours != theirs
