"""Images to visual tokens: open, tile, run the tower, merge. Counts and boxes need sizes only."""
