"""Each floor imports only from the ones below it, or from itself."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dpocli"
FLOORS = {
    name: floor
    for floor, names in enumerate(
        [
            ("__init__", "errors", "progress"),
            ("config", "terminal"),
            ("options",),
            ("data",),
            ("objective",),
            ("artifacts",),
            ("engine",),
            ("commands",),
            ("cli",),
            ("__main__",),
        ]
    )
    for name in names
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def floor_of(module: str) -> str:
    """`dpocli.data.encode` → `data`."""
    return [*module.split("."), "__init__"][1]


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides which floor it reaches"
            names = [alias.name for alias in node.names] if node.module == "dpocli" else []
            yield from [f"dpocli.{name}" for name in names if name in FLOORS] or [str(node.module)]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_come_from_the_same_floor_or_one_below(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for module in imported_modules(path):
        if module.split(".")[0] == "dpocli":
            other = floor_of(module)
            assert other == own or FLOORS[other] < FLOORS[own], f"{own} may not import {module}"


def test_every_part_has_its_floor():
    parts = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in modules()}
    assert parts <= FLOORS.keys()
