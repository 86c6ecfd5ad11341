"""What `speed.py` asks of a process of its own."""

import json
from dataclasses import asdict, dataclass

ABLATIONS = (
    "shared prompts",
    "packed rows",
    "several pairs a pass",
    "tiles of the vocabulary",
    "completion positions only",
    "memory kept when freed",
    "logits kept for the backward pass",
)
"""Parts of dpocli that can be switched off (with_dpocli.py). Without packed rows, prompts are not shared either; the last
one plays no part in precompute."""


@dataclass(frozen=True)
class Task:
    """Travels as a JSON object in the only argument of `speed_child.py`."""

    what: str
    """precompute or train, which are measured; data, reference, oracle or plain, which make what these need."""
    tool: str = "dpocli"
    """dpocli or trl."""
    model: str = ""
    """Its directory."""
    pairs: str = ""
    """The file that holds them."""
    count: int = 0
    """The first so many of them are used."""
    batch: int = 0
    """TRL: pairs in a padded batch."""
    restricted: bool = False
    """TRL: its head skips the positions of prompts and padding."""
    without: str | None = None
    """dpocli: the one of `ABLATIONS` that is switched off."""
    live: bool = False
    """dpocli: a reference scores each training batch, in the place of the cache."""
    cache: str = ""
    """dpocli: a reference cache, to measure how long reading takes."""
    rows: str = ""
    """data: the source rows."""
    out: str = ""
    """data, reference: where to write to. data also writes the random model there."""

    def as_argument(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_argument(cls, argument: str) -> "Task":
        return cls(**json.loads(argument))
