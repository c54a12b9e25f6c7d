"""Decodes photographs and cuts them into patches in threads, the next step's while a GPU works on this one.

    load(paths of step 3), expect(those of step 4)   step 3 runs   load(those of step 4): most are there

A photograph of 12 megapixels takes 0.25 s. Pillow and NumPy let other threads run meanwhile. At most what is
expected is kept. Nothing depends on whether it was expected.
"""

import copy
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from model.prompt import Patches
from training.pixels import ImageError, load_image

THREADS = min(8, os.cpu_count() or 1)


class Photographs:
    """Loads images by their paths, which may be relative to `folder`.

    max_pixels, token_side: see `load_image`.
    patches: cuts an image into patches (`VLM.patches`), once there is a model. Until then images are whole.
    """

    def __init__(self, max_pixels: int | None = None, token_side: int = 28, folder: Path = Path()):
        self.folder = folder
        self.max_pixels = max_pixels
        self.token_side = token_side
        self.patches: Callable[[Image.Image], Patches] | None = None
        self.expected: dict[str, Future] = {}
        self.threads = ThreadPoolExecutor(THREADS)  # which start when there is something to do

    def load(self, paths: Sequence[str]) -> list[Image.Image | Patches | ImageError]:
        """Returns what each path shows, decoded once, or why it cannot be used.

        A path that comes again has an object of its own. Prompts about one object would share a
        prefill, which rounds in another way.
        """
        found = self._begin(paths)
        return [copy.copy(found[path].result()) for path in paths]

    def expect(self, paths: Sequence[str]) -> None:
        """Begins with the images that are probably asked for next, and forgets all others."""
        before = self.expected
        self.expected = self._begin(paths)
        for future in before.values():
            future.cancel()

    def _begin(self, paths: Sequence[str]) -> dict[str, Future]:
        """Takes the expected images out, and begins with the others."""
        begun = {}
        for path in dict.fromkeys(paths):
            expected = self.expected.pop(path, None)
            begun[path] = expected or self.threads.submit(self._decode, path)
        return begun

    def _decode(self, path: str) -> Image.Image | Patches | ImageError:
        try:
            image = load_image(str(self.folder / path), self.max_pixels, self.token_side)
        except ImageError as error:
            return error
        return image if self.patches is None else self.patches(image)
