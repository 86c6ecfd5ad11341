import contextlib
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dpocli import __version__, errors
from dpocli.cli import run_command_line
from dpocli.config.flags import COMMANDS, options_of
from dpocli.distributed.signals import EarlyStop, StopFlag
from dpocli.run.directory import RunDirectory

TRAIN = ["train", "--model", "m", "--out", "o"]


@pytest.fixture
def commands(monkeypatch):
    """Stands in for the three commands: remembers the options; calls `act` if a test sets it."""
    calls = SimpleNamespace(options=None, act=lambda options, console: None)

    def run(options, console):
        calls.options = options
        calls.act(options, console)

    for name in COMMANDS:
        monkeypatch.setitem(sys.modules, f"dpocli.commands.{name}", SimpleNamespace(run=run))
    return calls


@pytest.fixture
def fails(capsys, commands):
    """Runs a command line that is wrong: gives what it says about it, after checking how it says it."""

    def check(*arguments, code=errors.ExitCode.USAGE):
        assert run_command_line(arguments) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        assert err.startswith("error: ")
        return err

    return check


def dpocli(*arguments, **how):
    return subprocess.run([sys.executable, "-m", "dpocli", *arguments], capture_output=True, text=True, **how)


# what the commands are given


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_gets_its_options(commands, command):
    assert run_command_line([command, "--model", "m", "--out", "o", "--data", "d", "--data", "e,f"]) == 0
    assert type(commands.options) is COMMANDS[command]
    assert commands.options.data.files == ["d", "e,f"]


@pytest.mark.parametrize("spelling", [["--batch-size", "8"], ["--batch_size", "8"], ["--batch_size=8"]])
def test_underscores_are_dashes_in_names(commands, spelling):
    assert run_command_line([*TRAIN, *spelling]) == 0
    assert commands.options.optimizer.batch_size == 8


def test_values_are_left_as_they_stand(commands):
    assert (
        run_command_line([*TRAIN, "--reference", "a_b=c", "--revision=--x_y", "--prompt-field", "-p"])
        == errors.ExitCode.USAGE
    )
    assert run_command_line(["precompute", "--model", "a_b=c", "--out=--x_y", "--data", "-p"]) == 0
    assert (commands.options.model.name, str(commands.options.out), commands.options.data.files) == (
        "a_b=c",
        "--x_y",
        ["-p"],
    )


def test_switches_are_pairs(commands, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("model_dropout: true\ngradient_checkpointing: true\n")
    assert run_command_line([*TRAIN, "--config", str(config), "--no-model-dropout"]) == 0
    assert (commands.options.policy.model_dropout, commands.options.policy.gradient_checkpointing) == (False, True)


def test_json_and_rank_reach_the_terminal(commands, capsys, monkeypatch):
    commands.act = lambda options, console: console.result({"pairs": 3}, lambda printer: printer.say("three"))
    assert run_command_line([*TRAIN, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"pairs": 3}
    assert run_command_line(TRAIN) == 0
    assert capsys.readouterr().out == "three\n"
    monkeypatch.setenv("RANK", "1")
    assert run_command_line(TRAIN) == 0
    assert capsys.readouterr().out == ""


# what is wrong with a command line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "did you mean train?"),
        (["score"], "precompute, train, evaluate"),
        (["--beta", "1", "train"], "the command comes first"),
        (["train", "--bete", "1"], "--bete: there is no such option; did you mean --beta?"),
        (["train", "--bete=1"], "--bete: there is no such option; did you mean --beta?"),
        (["train", "-x"], "-x: there is no such option"),
        (["train", "--shard", "0/1"], "it belongs to precompute"),
        (["train", "--beta"], "--beta: needs a value"),
        (["train", "--out", "--json"], "--out: needs a value"),
        (["train", "--out", ""], "--out: the value is empty"),
        (["train", "--json=true"], "--json: takes no value"),
        (["train", "--data", "a", "b"], "b: belongs to no option"),
        (["train", "--", "b"], "--: there is no such option"),
        (["train"], "--model: missing"),
        (["train", "--per_device_train_batch_size=4"], "multiply per_device_train_batch_size by"),
        (["train", "--output-dir", "x"], "use --out"),
        (["train", "--bf16"], "--dtype bfloat16"),
        ([*TRAIN, "--beta", "-1"], "--beta -1: must be above 0"),
        ([*TRAIN, "--config", "missing.yaml"], "missing.yaml: cannot be read"),
    ],
)
def test_a_wrong_command_line(fails, arguments, expected):
    assert expected in fails(*arguments)


def test_no_arguments_show_the_help_but_are_no_success(capsys):
    assert run_command_line([]) == errors.ExitCode.USAGE
    assert "precompute" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_option(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "200")
    assert run_command_line([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for option in options_of(COMMANDS[command]):
        assert option.flag in out
    assert "(default: 2048)" in out


def test_version(capsys):
    assert run_command_line(["--version"]) == 0
    assert capsys.readouterr().out == f"dpocli {__version__}\n"


# errors become exit codes


class OutOfMemoryError(RuntimeError):
    """As torch.cuda's, by name."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("told"), 2),
        (errors.DataError("told"), 3),
        (errors.CacheError("told"), 4),
        (errors.NumericsError("told"), 5),
        (errors.ResourceError("told"), 7),
        (MemoryError("told"), 7),
        (OutOfMemoryError("told"), 7),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory, told"), 7),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`, told"), 7),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED, told"), 7),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED, told"), 7),
        (RuntimeError("CUDA error: out of memory, told"), 7),
        (OSError(12, "told"), 7),
        (OSError(28, "told"), 7),
        (PermissionError(13, "told", "a-file"), 2),
        (KeyboardInterrupt("told"), 130),
    ],
)
def test_an_error_that_is_no_bug(fails, commands, error, code):
    def act(options, console):
        raise error

    commands.act = act
    assert "told" in fails(*TRAIN, code=code) or code == errors.ExitCode.INTERRUPTED


def test_a_stop_on_request_is_no_error(commands, capsys):
    def act(options, console):
        raise errors.PreemptedError("saved at step 3")

    commands.act = act
    assert run_command_line(TRAIN) == errors.ExitCode.PREEMPTED
    assert capsys.readouterr().err == "saved at step 3\n"


def test_a_bug_shows_its_traceback_and_asks_for_a_report(commands, capsys):
    commands.act = lambda options, console: {}["nothing"]
    assert run_command_line(TRAIN) == errors.ExitCode.BUG
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" in err
    assert "report" in err


def test_nobody_reads_the_result(commands):
    def act(options, console):
        raise BrokenPipeError

    commands.act = act
    assert run_command_line(TRAIN) == 0


# the outcome of a command that failed before it came to its directory


def status_of(path):
    return json.loads((path / "status.json").read_text())


def test_a_misspelled_flag_replaces_an_earlier_outcome(fails, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with pytest.raises(errors.PreemptedError), RunDirectory(out, "train"):
        raise errors.PreemptedError("saved")
    status = status_of(out) | {"pid": 1, "pid_started": 0}  # of another process than this one
    (out / "status.json").write_text(json.dumps(status))
    fails("train", "--model", "m", "--out", str(out), "--bete", "1")
    assert {"state": "failed", "exit_code": 2}.items() <= status_of(out).items()


def test_a_living_writer_keeps_its_status(fails, tmp_path):
    with RunDirectory(tmp_path, "train"):
        fails("train", f"--out={tmp_path}", "--bete", "1")
        assert status_of(tmp_path)["state"] == "running"


def test_a_misspelled_directory_is_not_created(fails, tmp_path):
    fails("train", "--out", str(tmp_path / "new"), "--bete", "1")
    assert not (tmp_path / "new").exists()


# signals before a command has come to its directory


@pytest.fixture
def early_stop():
    """What a process makes first; here the handlers of the tests come back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield EarlyStop()
    for number, handler in before.items():
        signal.signal(number, handler)


def ask(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def preempted_once(out):
    with pytest.raises(errors.PreemptedError), RunDirectory(out, "train"):
        raise errors.PreemptedError("saved at step 3")
    (out / "status.json").write_text(json.dumps(status_of(out) | {"pid": 1, "pid_started": 0}))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_there_is_anything_to_save(commands, early_stop, tmp_path, capsys, number):
    preempted_once(tmp_path)
    commands.act = lambda options, console: ask(number)
    assert run_command_line(["train", "--model", "m", "--out", str(tmp_path)], early_stop) == 75
    err = capsys.readouterr().err
    assert err.startswith("Stopped on request before there was anything to save.")
    assert err.count("\n") == 1
    assert {"state": "preempted", "exit_code": 75, "message": err.strip()}.items() <= status_of(tmp_path).items()


def test_a_signal_while_the_directory_is_entered(commands, early_stop, tmp_path, capsys, monkeypatch):
    """Its first status is written, and nobody looks at a flag yet."""
    begin = RunDirectory._begin
    monkeypatch.setattr(RunDirectory, "_begin", lambda self: (begin(self), ask()))

    def act(options, console):
        with RunDirectory(options.out, "train"):
            pytest.fail("it went on")

    commands.act = act
    assert run_command_line(["train", "--model", "m", "--out", str(tmp_path)], early_stop) == 75
    assert capsys.readouterr().err.count("\n") == 1
    assert {"state": "preempted", "exit_code": 75}.items() <= status_of(tmp_path).items()


def test_a_signal_that_a_library_swallowed_is_not_lost(commands, early_stop):
    def act(options, console):
        with contextlib.suppress(KeyboardInterrupt):
            ask()
        ask()  # asked again it does not interrupt whatever notes the first one
        with StopFlag() as stop:
            assert stop

    commands.act = act
    assert run_command_line(TRAIN, early_stop) == 0


def test_a_signal_after_the_work_leaves_its_outcome(commands, early_stop, tmp_path):
    def act(options, console):
        with RunDirectory(options.out, "train"):
            with StopFlag() as stop:
                assert not stop
            ask()

    commands.act = act
    assert run_command_line(["train", "--model", "m", "--out", str(tmp_path)], early_stop) == 0
    assert status_of(tmp_path)["state"] == "done"


# in a process of its own


SIGNAL_AT_AN_IMPORT = """
import os, signal, sys
module, number = sys.argv[1:3]
del sys.argv[1:3]
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), int(number))
sys.meta_path.insert(0, Finder())
from dpocli.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("module", "number", "code"),
    [
        ("typer", signal.SIGTERM, 75),
        ("dpocli.commands.precompute", signal.SIGTERM, 75),
        ("torch", signal.SIGUSR1, 75),
        ("typer", signal.SIGINT, 130),
        ("torch", signal.SIGINT, 130),
    ],
)
def test_a_signal_during_the_imports(module, number, code):
    line = ["precompute", "--model", "m", "--data", "d", "--out", "o"]
    command = [sys.executable, "-c", SIGNAL_AT_AN_IMPORT, module, str(int(number)), *line]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.startswith("Stopped on request" if code == 75 else "error: Interrupted.")
    assert done.stderr.count("\n") == 1


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow', 'numpy', 'matplotlib', 'tqdm'}"
    code = f"import sys, dpocli.cli; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_into_a_closed_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dpocli", "train", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_exit_codes_reach_the_shell():
    done = dpocli("train", "--lr", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --lr: ")
    assert done.stderr.count("\n") == 1


def test_one_process_where_accelerate_was_to_start_several(commands, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    line = [*TRAIN, "--reference", "r"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # --cpu --num_processes 1
    assert run_command_line(line) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # --cpu --num_processes 2
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert run_command_line(line) == 0
    assert "warning: accelerate launch has started this as one process" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_command_line(line) == 0
    assert capsys.readouterr().err == ""
