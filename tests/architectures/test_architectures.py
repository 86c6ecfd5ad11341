"""Cached log-probs, the first loss and the saved model of tiny models, against an oracle that shares no code with dpocli."""

from math import log
from pathlib import Path

import pytest
import torch

from tests.architectures.configurations import ARCHITECTURES
from tests.architectures.survey import survey

FAST = [
    ("xlstm", "float32"),  # ignores `logits_to_keep`
    ("lfm2_c", "bfloat16"),  # a convolution reads the end of the chosen side
    ("lfm2_c", "float32"),  # and reaches over a short prompt into the pair before
    ("deepseek_v32", "float32"),  # chooses its keys over the padded width
    ("llama4_text", "float32"),  # returns itself as its decoder
    ("phimoe", "float32"),  # uses its router's jitter as a threshold
]
EVERYTHING = [(name, dtype) for name in ARCHITECTURES for dtype in ("float32", "bfloat16")]
REFUSED = {
    "llama_dynamic": "--max-length",
    "longcat_flash": "the forward pass of longcat_flash fails in transformers",
}
"""Models that are refused, with a part of the message."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in EVERYTHING if case not in FAST)],
)
@pytest.mark.filterwarnings("ignore")  # of transformers, about configurations as tiny as these
def test_an_architecture(name: str, dtype: str, tmp_path: Path) -> None:
    line = survey(name, dtype, tmp_path / "work")
    if line.error:
        # Some architectures cannot run in bfloat16; that is a usage error which names them, never a traceback.
        assert "exit 2" in line.error, line
        assert REFUSED.get(name, f"the forward pass of {name.partition('_')[0]}") in line.error, line
        return
    within = 1e-4 if dtype == "float32" else 0.02
    assert line.difference - line.plain <= within, line
    assert line.first_loss == pytest.approx(log(2), abs=1e-4 if dtype == "float32" else 0.02), line
    assert line.saved == "same", line
