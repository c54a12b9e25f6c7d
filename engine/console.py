"""What a run says: lines on standard error, a bar on a terminal, and never half a minute of silence."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

SILENCE = 25  # seconds after which it says what it is doing


class Console:
    """The voice of a run; of several processes only the first speaks. doing: what it is at, in words."""

    def __init__(self, speaks: bool):
        self.speaks, self.doing = speaks, "starting"
        self.spoke = self.began = time.monotonic()

    def say(self, message: str) -> None:
        """A line that does not break a progress bar."""
        self.spoke = time.monotonic()
        if self.speaks:
            tqdm.write(message, file=sys.stderr)

    def now(self, doing: str) -> None:
        """Something else begins."""
        self.doing, self.began = doing, time.monotonic()

    def progress(self, done: int, steps: int, what: str) -> Iterator[int]:
        """The steps done + 1 to `steps`, with a bar if standard error is a terminal."""
        hidden = None if self.speaks else True
        bar = tqdm(range(done + 1, steps + 1), what, leave=False, disable=hidden, initial=done, total=steps)
        for step in bar:
            self.now(f"{what}, step {step} of {steps}")
            if not bar.disable:
                self.spoke = time.monotonic()
            yield step

    @contextmanager
    def alive(self):
        """In a `with` block it says what it is doing whenever it has been silent for long."""
        over = threading.Event()

        def watch():
            while not over.wait(1):
                if time.monotonic() - self.spoke > SILENCE:
                    self.say(f"... {self.doing}, for {time.monotonic() - self.began:.0f} s")

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
