"""Model families, one file each: what a checkpoint of the family means."""
