"""Decodes photographs in threads, those of the next step while a GPU works on this one.

    load(paths of step 3), expect(those of step 4)   step 3 runs   load(those of step 4): most are there

A photograph of 12 megapixels takes 0.2 s, and Pillow lets other threads run meanwhile. At most what is
expected is kept, scaled down as `load_image` does. Nothing depends on whether it was expected.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from PIL import Image

from training.pixels import ImageError, load_image

THREADS = min(8, os.cpu_count() or 1)


class Photographs:
    """Loads images by their paths; max_pixels, token_side: see `load_image`."""

    def __init__(self, max_pixels: int | None = None, token_side: int = 28):
        self.max_pixels = max_pixels
        self.token_side = token_side
        self.expected: dict[str, Future] = {}
        self.threads = ThreadPoolExecutor(THREADS)  # which start when there is something to do

    def load(self, paths: Sequence[str]) -> dict[str, Image.Image | ImageError]:
        """Returns the image of each path, decoded once, or why it cannot be used."""
        found = {
            path: self.expected.pop(path, None) or self._start(path)
            for path in [*dict.fromkeys(paths)]
        }
        return {path: future.result() for path, future in found.items()}

    def expect(self, paths: Sequence[str]) -> None:
        """Begins with the images that are probably asked for next, and forgets all others."""
        before = self.expected
        self.expected = {
            path: before.pop(path, None) or self._start(path) for path in dict.fromkeys(paths)
        }
        for future in before.values():
            future.cancel()

    def _start(self, path: str) -> Future:
        return self.threads.submit(self._decode, path)

    def _decode(self, path: str) -> Image.Image | ImageError:
        try:
            return load_image(path, self.max_pixels, self.token_side)
        except ImageError as error:
            return error
