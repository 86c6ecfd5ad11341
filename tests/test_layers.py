"""The packages import downwards only, without a circle, and stay small enough to be known."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dpocli"
LAYERS = [
    "errors",
    "console",
    "config",
    "run",
    "data",
    "objective",
    "distributed",
    "model",
    "cache",
    "checkpoint",
    "scoring",
    "evaluation",
    "report",
    "training",
    "commands",
    "cli",
    "__main__",
]
"""Bottom to top; each imports from itself and from those before it."""


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("dpocli", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a module imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides which layer it reaches"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in known or node.module in known:
                    yield name if name in known else str(node.module)


def layer(module: str) -> int:
    """`dpocli.data.encoder` → that of `data`; -1 for `dpocli` itself, which holds the version alone."""
    _, _, rest = module.partition(".")
    return LAYERS.index(rest.partition(".")[0]) if rest else -1


def test_imports_lead_downwards():
    known = modules()
    upwards = [
        f"{module} imports {other}"
        for module, path in known.items()
        for other in imports(path, known)
        if module != "dpocli" and layer(other) > layer(module)
    ]
    assert upwards == []


def test_there_is_no_circle():
    known = modules()
    TopologicalSorter({module: set(imports(path, known)) - {module} for module, path in known.items()}).prepare()


def test_a_package_is_small_enough_to_be_known():
    crowded = {}
    for folder in {path.parent for path in modules().values()}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        if len(files) > 14:
            crowded[folder.name] = len(files)
    assert crowded == {}


def test_a_module_can_be_read_in_one_sitting():
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in modules().items()}
    assert {module: length for module, length in lengths.items() if length > 300} == {}
