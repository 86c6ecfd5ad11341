"""A command that stands still at a chosen call, so that a kill comes in time on any machine.

`python -m tests.commands.held MODULE:CLASS.METHOD NUMBER ARGUMENTS…` says "held" on stdout when it does.
"""

import importlib
import itertools
import sys
import time
from typing import Any

from dpocli.cli import run_command_line


def hold(name: str, number: int) -> None:
    module, _, place = name.partition(":")
    class_name, _, method_name = place.partition(".")
    owner = getattr(importlib.import_module(module), class_name)
    method, calls = getattr(owner, method_name), itertools.count(1)

    def held(*arguments: Any, **named: Any) -> Any:
        if next(calls) == number:
            print("held", flush=True)
            time.sleep(3600)
        return method(*arguments, **named)

    setattr(owner, method_name, held)


if __name__ == "__main__":
    hold(sys.argv[1], int(sys.argv[2]))
    sys.exit(run_command_line(sys.argv[3:]))
