"""What is in the tree is what gets installed: setuptools' explicit lists against the folders."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("kernels", "tiers", "kvcache", "router", "serve", "perf")


def project(tree: Path) -> dict[str, Any]:
    return tomllib.loads((tree / "pyproject.toml").read_text())


def folders_with_modules(tree: Path) -> set[Path]:
    """Folders below the layers that hold Python modules, relative to `tree`."""
    return {path.parent.relative_to(tree) for layer in LAYERS for path in (tree / layer).rglob("*.py")}


def packaging_violations(tree: Path) -> list[str]:
    """Differences between pyproject.toml and the folders. An unlisted package vanishes from the wheel."""
    setuptools = project(tree)["tool"]["setuptools"]
    listed: list[str] = setuptools["packages"]
    places: dict[str, str] = setuptools["package-dir"]
    present = {"dynamo." + ".".join(folder.parts): str(folder) for folder in folders_with_modules(tree)}
    found = [f"{name} holds modules and is not in packages" for name in sorted(present.keys() - set(listed))]
    found += [f"{name} is in packages and holds no modules" for name in sorted(set(listed) - present.keys())]
    found += [f"{name} is not in package-dir" for name in sorted(set(listed) - places.keys())]
    found += [
        f"package-dir puts {name} at {places[name]}, it is at {folder}"
        for name, folder in sorted(present.items())
        if name in places and Path(places[name]) != Path(folder)
    ]
    found += [
        f"{folder} has no __init__.py" for folder in present.values() if not (tree / folder / "__init__.py").exists()
    ]
    return found


def test_every_folder_with_modules_is_installed_where_it_lies() -> None:
    assert packaging_violations(ROOT) == []


def test_every_package_ships_its_type_marker() -> None:
    data = project(ROOT)["tool"]["setuptools"]["package-data"]
    assert "py.typed" in data["*"]
    assert [layer for layer in LAYERS if not (ROOT / layer / "py.typed").exists()] == []


def test_package_data_patterns_match_files() -> None:
    setuptools = project(ROOT)["tool"]["setuptools"]
    for package, patterns in setuptools["package-data"].items():
        if package == "*":
            continue
        folder = ROOT / setuptools["package-dir"][package]
        for pattern in patterns:
            assert any(path.is_file() for path in folder.glob(pattern)), f"{package}: nothing matches {pattern}"


@pytest.mark.skipif(not (ROOT / ".namespace").exists(), reason="source distributions leave the checkers' links out")
def test_type_checkers_see_every_layer() -> None:
    checked = project(ROOT)["tool"]["mypy"]["packages"]
    assert sorted(checked) == sorted(f"dynamo.{layer}" for layer in LAYERS)
    links = {path.name: path.resolve() for path in (ROOT / ".namespace" / "dynamo").iterdir()}
    assert links == {layer: ROOT / layer for layer in LAYERS}


def test_no_package_takes_the_namespace_for_itself() -> None:
    """`dynamo` is a PEP 420 namespace: an `__init__.py` in it would hide every other distribution's part."""
    assert "dynamo" not in project(ROOT)["tool"]["setuptools"]["packages"]
    assert not (ROOT / ".namespace" / "dynamo" / "__init__.py").exists()


def test_bare_names_are_banned_for_every_layer() -> None:
    banned = project(ROOT)["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert sorted(banned) == sorted(LAYERS)


def test_tests_are_no_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize(
    ("packages", "places", "violation"),
    [
        (["dynamo.tiers"], {"dynamo.tiers": "tiers"}, "dynamo.tiers.deep holds modules and is not in packages"),
        (
            ["dynamo.tiers", "dynamo.tiers.deep"],
            {"dynamo.tiers": "tiers"},
            "dynamo.tiers.deep is not in package-dir",
        ),
        (
            ["dynamo.tiers", "dynamo.tiers.deep"],
            {"dynamo.tiers": "tiers", "dynamo.tiers.deep": "tiers"},
            "package-dir puts dynamo.tiers.deep at tiers, it is at tiers/deep",
        ),
        (
            ["dynamo.tiers", "dynamo.tiers.deep", "dynamo.gone"],
            {"dynamo.tiers": "tiers", "dynamo.tiers.deep": "tiers/deep", "dynamo.gone": "gone"},
            "dynamo.gone is in packages and holds no modules",
        ),
    ],
)
def test_control_a_difference_is_found(
    tmp_path: Path, packages: list[str], places: dict[str, str], violation: str
) -> None:
    for folder in ("tiers", "tiers/deep"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    table = ", ".join(f'"{name}" = "{place}"' for name, place in places.items())
    (tmp_path / "pyproject.toml").write_text(f"[tool.setuptools]\npackages = {packages}\npackage-dir = {{{table}}}\n")
    assert packaging_violations(tmp_path) == [violation]
