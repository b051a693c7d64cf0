"""What a run does when the system asks it to stop. Imports nothing but the standard library.

While a run learns, the first SIGINT, SIGTERM or SIGHUP is only noted: the step is finished, the
state is saved, and :class:`Stopped` ends the run. Elsewhere it ends the run where it is. A second
signal ends the process at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["Stopped", "asked", "check", "deferred", "handled", "quit_quietly"]

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class Stopped(KeyboardInterrupt):
    """The system asked the run to stop.

    Args:
        signum: Number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    @property
    def code(self) -> int:
        """Exit code that shells and schedulers expect: 130, 143 or 129."""
        return 128 + self.signum

    def __str__(self) -> str:
        return signal.Signals(self.signum).name


class _State:
    asked: int | None = None
    deferred = False
    owner = 0  # loading processes inherit the handlers


def _handle(signum: int, frame: FrameType | None) -> None:
    first, _State.asked = _State.asked is None, signum
    if not first:
        os._exit(128 + signum)
    if os.getpid() != _State.owner:
        return  # a loading process goes on until the run has saved
    if not _State.deferred:
        raise Stopped(signum)
    name = signal.Signals(signum).name
    text = f"\n{name}: the step is finished and saved first; once more stops at once.\n"
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handle the signals in this block; those that are ignored (nohup) stay ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.asked, _State.deferred, _State.owner = None, False, os.getpid()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    mine = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in mine:
        signal.signal(number, _handle)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, before[number] or signal.SIG_DFL)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Only take note of a signal in this block; it is acted upon by :func:`check`, or at its end.

    Raises:
        Stopped: At the end, if a signal was noted and nothing else was raised.
    """
    before, _State.deferred = _State.deferred, True
    try:
        yield
    finally:
        _State.deferred = before
    if not before:
        check()


def asked() -> int | None:
    """Return the number of the signal that asked the run to stop; None if there was none."""
    return _State.asked


def check() -> None:
    """Raise :class:`Stopped` if a signal has asked for it."""
    if _State.asked is not None:
        raise Stopped(_State.asked)


def quit_quietly(signum: int, frame: FrameType | None) -> None:
    """End a process that has done nothing yet; a handler for the time of the imports."""
    with contextlib.suppress(OSError):
        os.write(2, b"Interrupted before anything was done.\n")
    os._exit(128 + signum)
