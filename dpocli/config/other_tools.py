"""Names of options and losses of other tools, and what to write here instead; `other_tools.yaml` lists them."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

import yaml


@cache
def answers(kind: Literal["options", "losses", "refused_losses"]) -> Mapping[str, str]:
    """The answer to each name. The file is read only where a name is not one of ours."""
    entries = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))[kind]
    return {name: entry["answer"] for entry in entries for name in entry["names"]}
