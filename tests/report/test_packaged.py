"""What the package reads at run time is in the wheel too."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_file_that_is_no_module_is_package_data():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["dpocli"]
    package = ROOT / "dpocli"
    files = [path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert len(files) > 2
    for path in files:
        assert any(fnmatch(str(path.relative_to(package)), pattern) for pattern in patterns), path
