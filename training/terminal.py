"""Prints for people who may be gone: what cannot be shown, or nobody reads any more, stops no command."""

import errno
import os
import signal
import sys
from collections.abc import Callable

# Errors of a write that nobody waits for: a broken pipe, a terminal that was closed.
UNREAD = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)


class Output:
    """Is a text stream that spells out what it cannot encode, and drops what it cannot write."""

    def __init__(self, stream):
        self.stream = stream
        self.failure: OSError | None = None  # of a write that somebody waits for: a full disk

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Writes a text, with backslashes for what the stream's encoding lacks."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        shown = text.encode(encoding, "backslashreplace").decode(encoding)
        self._attempt(lambda: self.stream.write(shown))
        return len(text)

    def flush(self) -> None:
        """Writes what the stream holds back."""
        self._attempt(self.stream.flush)

    def _attempt(self, act: Callable) -> None:
        """Calls act(); notes an error, and drops it."""
        try:
            act()
        except OSError as error:
            if error.errno not in UNREAD:
                self.failure = error
        except ValueError:  # the stream is closed
            pass


def prepare_output() -> None:
    """Makes `print`, and all else that writes to standard output and error, go on whatever happens to them.

    A terminal that is closed does not end the program, either. Idempotent.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed when the program began; the next file would take its place
            stream = open(os.devnull, "w")
        if not isinstance(stream, Output):
            setattr(sys, name, Output(stream))
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    except (AttributeError, ValueError):  # Windows has no such signal; a thread may not set it
        pass
