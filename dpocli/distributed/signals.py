"""Asked to stop, by a signal: raised while there is nothing to save, from then on a flag that the work looks at."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

from dpocli.errors import StopSignal

ASKING = (signal.SIGTERM, signal.SIGUSR1)


class EarlyStop:
    """Signals while there is nothing to save yet. Made as the first thing in a process; a `StopFlag` takes over.

    Inside `with` the first signal is raised, as Ctrl-C is; one that comes before waits until then, since only there an
    error becomes an exit code.
    """

    def __init__(self) -> None:
        self.asked = False
        self._interrupted = self._is_inside = self._is_over = False
        for number in ASKING:
            signal.signal(number, self)
        if (
            signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):  # a shell lets jobs in the background ignore it
            signal.signal(signal.SIGINT, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - what a handler is given
        if number == signal.SIGINT:
            self._interrupted = True
            return
        is_first, self.asked = not self.asked, True
        if is_first and self._is_inside and not self._is_over:
            raise StopSignal

    def __enter__(self) -> Self:
        if signal.getsignal(signal.SIGINT) is self:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._is_inside = True
        if self._interrupted:
            raise KeyboardInterrupt
        if self.asked:
            raise StopSignal
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True

    def give_way(self) -> bool:
        """Raises nothing any more. Whether a signal came by now: what was raised may have got lost in a library."""
        self._is_over = True
        return self.asked


class StopFlag:
    """Whether a signal asked to stop. The handler sets a flag and nothing else; the work looks at it where it can.

    For use with `with`, in the main thread; leaving brings the earlier handlers back.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._earlier = {number: signal.signal(number, self._set) for number in ASKING}
        for handler in self._earlier.values():
            if isinstance(handler, EarlyStop) and handler.give_way():
                self.is_set = True
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.is_set

    def _set(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - what a handler is given
        self.is_set = True
