"""What a checkpoint's config.json says, checked once."""
