"""`redvtp heatmap`: the pruning in a saved API response (or trace), drawn over the images that were sent."""

from __future__ import annotations

import argparse
from pathlib import Path

from redvtp.cli.checks import check_picture, open_images, read_json
from redvtp.errors import BadInput, refusing


def heatmap(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BadInput for a response without prunings, or images that are not its images."""
    with refusing():
        check_picture("output", options.output)
        saved = read_json(str(options.response), options.response)
        images = open_images(options.image)
        # torch takes seconds to import: only once the files are known to be there.
        from redvtp.families.config import load_config
        from redvtp.heatmap import draw_saved, prunings_of

        prunings_of(saved)
        # A server that was started with a folder answers with that folder as the model's name.
        folder = options.model or saved.get("model")
        if not folder or not (Path(folder) / "config.json").is_file():
            raise BadInput(f"{folder or 'no model'} is not a checkpoint folder on this machine; name it with --model")
        draw_saved(images, load_config(folder), saved).save(options.output)
    return 0
