"""Stop signals: an exception before there is anything to save, a polled flag after."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

from dpocli.errors import StopSignal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class EarlyStop:
    """Stop signals before there is anything to save. Made first in a process; a `StopFlag` takes over.

    The first signal inside `with` is raised, as Ctrl-C is. One that comes before waits until then, since an error becomes
    an exit code only there.
    """

    def __init__(self) -> None:
        self.asked = False
        self._interrupted = self._is_inside = self._is_over = False
        for number in STOP_SIGNALS:
            signal.signal(number, self)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
            signal.signal(signal.SIGINT, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the arguments of a handler
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

    def hand_over(self) -> bool:
        """Stop raising. Whether a signal came before: a library may have swallowed what was raised."""
        self._is_over = True
        return self.asked


class StopFlag:
    """Whether a stop signal came. The handler only sets a flag, which the work polls where it can stop.

    For use with `with`, in the main thread; leaving restores the earlier handlers.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._earlier = {number: signal.signal(number, self._set) for number in STOP_SIGNALS}
        for handler in self._earlier.values():
            if isinstance(handler, EarlyStop) and handler.hand_over():
                self.is_set = True
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.is_set

    def _set(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the arguments of a handler
        self.is_set = True
