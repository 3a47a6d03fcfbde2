"""From images to visual tokens, the tower run once for each: over all new images together, and not for one it has seen.

What the language model reads of an image depends on its pixels and on how it is tiled, never on the request. So visual
tokens are remembered by content, within a number of bytes; the least recently used go first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from redvtp.models.dvlm import Dvlm
from redvtp.vision.tiling import ImageMode

DEFAULT_CACHE_BYTES = 256 << 20


def content_digest(image: Image.Image) -> bytes:
    """[32] bytes that are equal for equal pixels only. A client's own name for an image would not do: it may lie."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return hashlib.sha256(b"%d %d " % rgb.size + rgb.tobytes()).digest()


@dataclass(frozen=True, slots=True)
class ImageInput:
    """digest: see `content_digest`. tiles: gives [tiles, 3, tile, tile] float32, if it is asked. size: (width, height)
    in pixels."""

    digest: bytes
    tiles: Callable[[], Tensor]
    size: tuple[int, int]
    mode: ImageMode

    @property
    def key(self) -> tuple[bytes, ImageMode]:
        return self.digest, self.mode


class ImageEncoder:
    """The vision path of one model. cache_bytes: visual tokens that are remembered; 0 remembers nothing."""

    def __init__(self, model: Dvlm, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self._model = model
        self._cache_bytes = cache_bytes
        self._remembered: OrderedDict[tuple[bytes, ImageMode], Tensor] = OrderedDict()
        self.bytes_held = 0

    @torch.inference_mode()
    def encode(self, images: list[ImageInput]) -> list[Tensor]:
        """For each image [visual, hidden], in the order the model reads them. Not to be written to."""
        found = {image.key: self._remembered[image.key] for image in images if image.key in self._remembered}
        for key in found:
            self._remembered.move_to_end(key)
        new = {image.key: image for image in images if image.key not in found}
        if new:
            encoded = self._model.encode_tiles(
                [image.tiles() for image in new.values()],
                [image.size for image in new.values()],
                [image.mode for image in new.values()],
            )
            found |= dict(zip(new, encoded, strict=True))
            for key in new:
                self._remember(key, found[key])
        return [found[image.key] for image in images]

    def clear(self) -> None:
        """Forget all, as when the weights have changed."""
        self._remembered.clear()
        self.bytes_held = 0

    def _remember(self, key: tuple[bytes, ImageMode], tokens: Tensor) -> None:
        if tokens.nbytes > self._cache_bytes:
            return
        # A copy: the tokens may be a view of all that the tower computed.
        self._remembered[key] = tokens.clone()
        self.bytes_held += tokens.nbytes
        while self.bytes_held > self._cache_bytes:
            _, oldest = self._remembered.popitem(last=False)
            self.bytes_held -= oldest.nbytes
