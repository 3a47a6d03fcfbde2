"""What every vision path has in common: the items of a request, and what a family's path can say about them.

A `VisionPath` belongs to one checkpoint and has no weights. It gives each item of a request a `Treatment`, which knows
the item's visual tokens from its size alone, and builds the `VisionModule` that computes them.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from PIL import Image
from torch import Tensor, nn

Kind = Literal["image"]
# (width, height) in pixels.
Size = tuple[int, int]
# (left, top, right, bottom) in pixels.
Box = tuple[float, float, float, float]


class Treatment(Hashable, Protocol):
    """How one item becomes visual tokens. Equal treatments of equal pixels give equal visual tokens."""

    def count(self, size: Size) -> int:
        """Visual tokens of an image of this size. Raises ValueError for a size that cannot be treated."""

    def boxes(self, size: Size) -> list[Box | None]:
        """The part of the image each visual token looks at, in token order; None for tokens that look at none."""

    def coarse(self, size: Size) -> range:
        """The visual tokens that show the whole image coarsely, beside others that show parts of it finely."""

    def inputs(self, image: Image.Image) -> Tensor:
        """What the vision module reads of the image, stacked along the first dimension."""


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One image on its way to visual tokens.

    kind: what it is.
    digest: [32] bytes, see `content_digest`.
    size: (width, height) in pixels.
    treatment: how it becomes visual tokens.
    inputs: computes `Treatment.inputs`; called only for items that no cache holds.
    """

    kind: Kind
    digest: bytes
    size: Size
    treatment: Treatment
    inputs: Callable[[], Tensor]

    @property
    def key(self) -> tuple[bytes, Treatment]:
        """Equal for items with equal visual tokens."""
        return self.digest, self.treatment


class VisionModule(nn.Module, ABC):
    """The weights of a vision path, projection to the language model's width included."""

    @abstractmethod
    def encode(self, items: Sequence[MediaItem]) -> list[Tensor]:
        """Visual tokens [visual, hidden] of each item, in the order the language model reads them."""

    @abstractmethod
    def encode_largest(self) -> Tensor:
        """Runs the calls that take most memory, for measuring it. Returns visual tokens [visual, hidden]."""


class VisionPath(ABC):
    """One checkpoint's way from media to visual tokens, without the weights."""

    @abstractmethod
    def treatments(self, kinds: Sequence[Kind]) -> list[Treatment]:
        """A treatment for each item of one request. kinds: of all its items, in order."""

    @abstractmethod
    def largest_size(self) -> Size:
        """The size with the most visual tokens, for an image alone in its request."""

    @abstractmethod
    def build(self, hidden_size: int) -> VisionModule:
        """The module, its weights not yet loaded. hidden_size: width of the language model."""

    def of_images(self, sizes: Sequence[Size]) -> list[Treatment]:
        """A treatment for each image of a request with these images only."""
        return self.treatments(["image"] * len(sizes))

    def counts(self, sizes: Sequence[Size]) -> list[int]:
        """Visual tokens of each image of a request with these images only."""
        return [treatment.count(size) for treatment, size in zip(self.of_images(sizes), sizes, strict=True)]

    def items(self, images: Sequence[Image.Image]) -> list[MediaItem]:
        """The items of a request with these images only."""
        return [
            MediaItem("image", content_digest(image), image.size, treatment, partial(treatment.inputs, image))
            for treatment, image in zip(self.of_images([image.size for image in images]), images, strict=True)
        ]


def content_digest(image: Image.Image) -> bytes:
    """[32] bytes that are equal for equal pixels only. A client's name for an image is no substitute: it can be
    wrong."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return hashlib.sha256(b"%d %d " % rgb.size + rgb.tobytes()).digest()
