"""Which of several processes this is, from the environment of torchrun or of srun."""

import pytest
import torch

from dpocli.console.console import Console, rank_from_environment
from dpocli.distributed.launch import first_host, launched, pick_device
from dpocli.errors import UsageError

SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "node-1"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SLURM, *TORCHRUN):
        monkeypatch.delenv(name, raising=False)


def environment(monkeypatch: pytest.MonkeyPatch, *variables: dict[str, str]) -> None:
    for some in variables:
        for name, value in some.items():
            monkeypatch.setenv(name, value)


def test_srun_counts_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, SLURM)
    assert launched("slurm") == (5, 8, 1)


def test_each_launcher_reads_its_own_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun inside a Slurm job: both are there."""
    environment(monkeypatch, SLURM, TORCHRUN)
    assert launched("slurm") == (5, 8, 1)
    assert launched() == launched("torchrun") == (2, 4, 0)
    assert (rank_from_environment("slurm"), rank_from_environment()) == (5, 2)


def test_a_slurm_job_without_the_option_is_a_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, SLURM)
    assert launched() == (0, 1, 0)
    assert rank_from_environment() == 0


def test_one_task_needs_no_more_than_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"})
    assert launched("slurm") == (0, 1, 0)


def test_without_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, TORCHRUN)
    with pytest.raises(
        UsageError, match=r"--launcher slurm: SLURM_STEP_NUM_TASKS is not in the environment.*with srun"
    ):
        launched("slurm")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"SLURM_PROCID": "8"}, "SLURM_PROCID=8 and SLURM_STEP_NUM_TASKS=8 in the environment do not fit together"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID=5 and SLURM_STEP_NUM_TASKS=2"),
        ({"SLURM_PROCID": "-1"}, "SLURM_PROCID=-1 in the environment is no number"),
        ({"SLURM_STEP_NUM_TASKS": "8(x2)"}, r"SLURM_STEP_NUM_TASKS=8\(x2\) in the environment is no number"),
        ({"SLURM_LOCALID": "one"}, "SLURM_LOCALID=one in the environment is no number"),
    ],
)
def test_an_environment_that_srun_does_not_make(
    variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(monkeypatch, SLURM, variables)
    with pytest.raises(UsageError, match=words):
        launched("slurm")


def test_tasks_of_a_machine_take_its_devices_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    environment(monkeypatch, TORCHRUN)
    for local, expected in (("0", 0), ("1", 1), ("3", 1)):
        environment(monkeypatch, SLURM, {"SLURM_LOCALID": local})
        assert pick_device("auto", "slurm") == current[-1] == torch.device("cuda", expected)
    assert pick_device("auto") == torch.device("cuda", 0)
    assert pick_device("cpu", "slurm") == torch.device("cpu")


def test_only_the_first_task_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for number in ("0", "5"):
        environment(monkeypatch, SLURM, {"SLURM_PROCID": number})
        console = Console(json=True, rank=rank_from_environment("slurm"))
        console.say("what happens")
        console.warn("what may be wrong")
        console.result({"task": number}, lambda _: None)
        out, err = capsys.readouterr()
        assert (out, err) == (
            ('{"task": "0"}\n', "what happens\nwarning: what may be wrong\n") if number == "0" else ("", "")
        )
        console.error("why it ends")
        assert capsys.readouterr().err == ("error: " if number == "0" else "error (rank 5): ") + "why it ends\n"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[007-012,020],login1", "gpu007"), ("node-3", "node-3"), ("a1,b2", "a1"), ("rack[2]", "rack2"), ("", "")],
)
def test_the_first_node_of_a_step(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
