"""Images to visual tokens: open, tile, run the tower, merge. Sizes alone give token counts: prompts need no pixels."""

from redvtp.vision.images import open_image, validate_size
from redvtp.vision.merge import merge_tiles, visual_token_boxes, visual_token_count
from redvtp.vision.tiling import ImageMode, Mode, image_mode, tile_image

__all__ = [
    "ImageMode",
    "Mode",
    "image_mode",
    "merge_tiles",
    "open_image",
    "tile_image",
    "validate_size",
    "visual_token_boxes",
    "visual_token_count",
]
