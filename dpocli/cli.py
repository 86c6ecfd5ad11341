"""The app: three thin commands, and the one place where errors become exit codes.

Nothing heavy is imported before a command runs, so that `--help` takes a third of a second.
"""

import difflib
import inspect
import sys
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
import yaml

from dpocli import __version__
from dpocli.config.commands import EvaluateOptions, PrecomputeOptions, TrainOptions
from dpocli.config.flags import COMMANDS, explain_unknown, options_of, signature_of
from dpocli.config.options import Options
from dpocli.config.parsing import load_options
from dpocli.console.console import Console, lone_process_warning, rank_from_environment, silence
from dpocli.distributed.signals import EarlyStop
from dpocli.errors import ExitCode, UsageError, is_recorded
from dpocli.run.status import Outcome, record_failure

OptionsModel = TypeVar("OptionsModel", bound=Options)

app = typer.Typer(
    name="dpocli",
    help="Direct Preference Optimization in three commands: precompute the reference, train, evaluate.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _dpocli(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"dpocli {__version__}")


def _command(model: type[OptionsModel]) -> Callable[[Callable[[OptionsModel, Console], None]], None]:
    """Register a function of options and console as a Typer command; its flags are the fields of `model`.

    Typer parses and returns the work, which runs outside of it: Typer has its own handling of Ctrl-C and broken pipes.
    """

    def declare(function: Callable[[OptionsModel, Console], None]) -> None:
        def command(**flags: Any) -> Callable[[], None]:
            options = load_options(model, flags)
            console = Console(json=options.as_json, rank=rank_from_environment(options.launcher))
            if warning := lone_process_warning():
                console.warn(warning)
            return lambda: function(options, console)

        command.__signature__ = signature_of(model)  # type: ignore[attr-defined]
        app.command(function.__name__, help=inspect.getdoc(model))(command)

    return declare


@_command(PrecomputeOptions)
def precompute(options: PrecomputeOptions, console: Console) -> None:
    """Score every pair with the reference."""
    from dpocli.commands.precompute import run

    run(options, console)


@_command(TrainOptions)
def train(options: TrainOptions, console: Console) -> None:
    """Train a policy."""
    from dpocli.commands.train import run

    run(options, console)


@_command(EvaluateOptions)
def evaluate(options: EvaluateOptions, console: Console) -> None:
    """Measure a policy."""
    from dpocli.commands.evaluate import run

    run(options, console)


def main(early_stop: EarlyStop | None = None) -> NoReturn:
    """Run the command line of this process and leave with its exit code."""
    sys.exit(run_command_line(sys.argv[1:], early_stop or EarlyStop()))


def run_command_line(arguments: Sequence[str], early_stop: EarlyStop | None = None) -> int:
    """Run a command line. Every error ends here and becomes an exit code."""
    try:
        with early_stop or nullcontext():
            work = app(checked(arguments or ["--help"]), prog_name="dpocli", standalone_mode=False)
            if callable(work):
                work()
            sys.stdout.flush()
    except BaseException as error:
        if _is_broken_pipe(error):
            silence(sys.stdout)
            return ExitCode.DONE
        return _report(error, arguments)
    return ExitCode.DONE if arguments else ExitCode.USAGE


def _is_broken_pipe(error: BaseException) -> bool:
    """Whether the reader of the output has closed it (`dpocli --help | head`); rich raises SystemExit then."""
    return isinstance(error.__context__ if isinstance(error, SystemExit) else error, BrokenPipeError)


def _report(error: BaseException, arguments: Sequence[str]) -> int:
    outcome = Outcome.of(error)
    if outcome.exit_code == ExitCode.BUG:
        traceback.print_exception(error)
    console = Console(rank=rank_from_environment(_value_of("--launcher", arguments) or "torchrun"))
    if outcome.exit_code == ExitCode.PREEMPTED:
        console.say(outcome.message)
    else:
        console.error(outcome.message)
    if not is_recorded(error):
        _record_early_failure(outcome, arguments, console.rank)
    return outcome.exit_code


def _record_early_failure(outcome: Outcome, arguments: Sequence[str], rank: int) -> None:
    """Record in `OUT/status.json` that a start failed before it opened its directory.

    A script that requeues while the state is "preempted" would else requeue for ever over a misspelled flag.
    """
    if any(argument.partition("=")[0] in ("--dry-run", "--verify") for argument in arguments):
        return  # they only look
    out = _value_of("--out", arguments) or _out_of_config(_value_of("--config", arguments))
    if rank == 0 and out and arguments[0] in COMMANDS:
        record_failure(Path(out), outcome, arguments[0], _value_of("--shard", arguments) or "0/1")


def _out_of_config(path: str | None) -> str | None:
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    out = entries.get("out") if isinstance(entries, dict) else None
    return out if isinstance(out, str) else None


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    for argument, following in pairwise([*arguments, ""]):
        name, equals, value = argument.partition("=")
        if name == flag:
            return value if equals else following
    return None


def checked(arguments: Sequence[str]) -> list[str]:
    """Normalize a command line for Typer: known names only, dashes for underscores, `--flag=value` throughout.

    Errors are found here, all at once, so that their wording and exit code 2 do not depend on Typer.

    Raises:
        UsageError: an unknown command, or unknown or incomplete flags, a line each.
    """
    command = arguments[0]
    if command in ("--help", "-h", "--version"):
        return [command]
    if command.startswith("-"):
        raise UsageError(f"{command}: the command comes first, {', '.join(COMMANDS)}: dpocli train {command} …")
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the first argument is one of {', '.join(COMMANDS)}."
        raise UsageError(f"{command}: there is no such command; {hint}")
    return [command, *_checked_flags(COMMANDS[command], arguments[1:])]


def _checked_flags(model: type[Options], arguments: Sequence[str]) -> list[str]:
    """The flags of a command as `--flag=value`. Errors as for `checked`."""
    options = {flag: option for option in options_of(model) for flag in option.flags}
    flags: list[str] = []
    problems: list[str] = []
    remaining = deque(arguments)
    while remaining:
        argument = remaining.popleft()
        name, equals, value = argument.partition("=")
        flag = name.replace("_", "-")
        if flag in ("--help", "-h"):
            flags.append(flag)
        elif flag in options and options[flag].is_switch:
            if equals:
                problems.append(f"{flag}: takes no value; write {flag} or leave it out.")
            flags.append(f"{options[flag].flag}={str(flag == options[flag].flag).lower()}")
        elif flag in options or flag == "--config":
            if not equals and (not remaining or remaining[0].startswith("--")):
                problems.append(f"{flag}: needs a value ({flag}=VALUE if it begins with dashes).")
            else:
                flags.append(f"{flag}={value if equals else remaining.popleft()}")
        elif name.startswith("-"):
            problems.append(f"{name}: {explain_unknown(name, model)}")
            if not equals and remaining and not remaining[0].startswith("-"):
                remaining.popleft()  # its value
        else:
            problems.append(f"{argument}: belongs to no option; one that takes several values is repeated.")
    if problems:
        raise UsageError("\n".join(problems))
    return flags
