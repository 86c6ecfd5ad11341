"""Asked to stop: by a signal, with nothing done in its handler but raising a flag."""

import signal
from types import FrameType
from typing import Any, Self


class StopFlag:
    """Whether a signal asked to stop. The handler sets a flag and nothing else; the work looks at it where it can.

    For use with `with`, in the main thread; leaving brings the earlier handlers back.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.is_set = False
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._earlier = {number: signal.signal(number, self._set) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.is_set

    def _set(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - what a handler is given
        self.is_set = True
