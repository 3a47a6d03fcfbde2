"""Visual tokens of the images of a batch: new ones are computed together, known ones come from a cache.

Visual tokens depend on an image's pixels and treatment, never on the request, so they are cached by content. The cache
holds a number of bytes; the least recently used go first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from redvtp.models.dvlm import Dvlm
from redvtp.vision.media import MediaItem, Treatment

DEFAULT_CACHE_BYTES = 256 << 20

Key = tuple[bytes, Treatment]


class ImageEncoder:
    """The vision path of one model. cache_bytes: size of the cache; 0 caches nothing."""

    def __init__(self, model: Dvlm, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self._model = model
        self._cache_bytes = cache_bytes
        self._cached: OrderedDict[Key, Tensor] = OrderedDict()
        self.bytes_held = 0

    @torch.inference_mode()
    def encode(self, items: Sequence[MediaItem]) -> list[Tensor]:
        """For each item [visual, hidden], in the order the language model reads them. Not to be written to."""
        found = {item.key: self._cached[item.key] for item in items if item.key in self._cached}
        for key in found:
            self._cached.move_to_end(key)
        new = {item.key: item for item in items if item.key not in found}
        if new:
            found |= dict(zip(new, self._model.vision.encode(list(new.values())), strict=True))
            for key in new:
                self._store(key, found[key])
        return [found[item.key] for item in items]

    def clear(self) -> None:
        """Empty the cache, as when the weights have changed."""
        self._cached.clear()
        self.bytes_held = 0

    def _store(self, key: Key, tokens: Tensor) -> None:
        if tokens.nbytes > self._cache_bytes:
            return
        # A copy: the tokens may be a view of all that the tower computed.
        self._cached[key] = tokens.clone()
        self.bytes_held += tokens.nbytes
        while self.bytes_held > self._cache_bytes:
            _, oldest = self._cached.popitem(last=False)
            self.bytes_held -= oldest.nbytes
