"""Images to visual tokens: open, tile, run the tower, merge. Sizes alone give token counts: prompts need no pixels."""
