"""A run goes on as if nothing had been, whatever its optimizer remembers."""

from pathlib import Path
from typing import Any

import pytest

from dpocli.training.optimizers import STATE_BYTES
from dpocli.training.trainer import Trainer
from tests.commands.conftest import MODEL, Run, metrics_of


@pytest.mark.filterwarnings("ignore:::bitsandbytes")
@pytest.mark.parametrize("name", STATE_BYTES)
def test_a_run_that_was_broken_off_ends_in_the_same_bits(
    name: str, cache: Path, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "adamw-8bit":
        pytest.importorskip("bitsandbytes")

    def line(out: str) -> tuple[object, ...]:
        return (
            "train", "--model", MODEL, "--reference", cache, "--out", tmp_path / out, "--optimizer", name,
            "--learning-rate", "5e-4", "--batch-size", 8, "--max-steps", 5, "--warmup-steps", 2, "--save-every", 1,
            "--scoring", "padded",
        )  # fmt: skip

    assert dpocli(*line("undisturbed")).code == 0
    step = Trainer.step

    def broken_off(trainer: Trainer, number: int) -> Any:
        if number == 4:
            raise KeyboardInterrupt
        return step(trainer, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", broken_off)
        assert dpocli(*line("broken")).code == 130
    again = dpocli(*line("broken"))
    assert (again.code, "Resuming after step 3" in again.err) == (0, True), again.err
    assert metrics_of(tmp_path / "broken") == metrics_of(tmp_path / "undisturbed")
    first, second = (tmp_path / out / "model" / "model.safetensors" for out in ("undisturbed", "broken"))
    assert first.read_bytes() == second.read_bytes()
