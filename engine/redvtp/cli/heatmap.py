"""`redvtp heatmap`: the pruning in a saved API response (or trace), drawn over the images that were sent."""

from __future__ import annotations

import argparse

from redvtp.cli.checks import Mistakes, check_picture, open_images, read_json
from redvtp.errors import BadInput, refusing
from redvtp.model_folder import why_no_model


def heatmap(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BadInput for a response without prunings, or images that are not its images."""
    mistakes = Mistakes()
    with mistakes:
        saved = read_json(str(options.response), options.response)
    with mistakes:
        images = open_images(options.image)
    with mistakes:
        check_picture("output", options.output)
    with mistakes:
        if options.model and (reason := why_no_model(options.model)) is not None:
            raise BadInput(f"--model {reason}")
    mistakes.refuse()
    with refusing():
        # torch takes seconds to import: only once the files are known to be there.
        from redvtp.families.config import load_config
        from redvtp.heatmap import draw_saved, prunings_of

        prunings_of(saved)
        # A server that was started with a folder answers with that folder as the model's name.
        folder = options.model or saved.get("model")
        if not options.model and (not isinstance(folder, str) or why_no_model(folder) is not None):
            raise BadInput(f"{folder or 'no model'} is not a checkpoint folder on this machine; name it with --model")
        draw_saved(images, load_config(folder), saved).save(options.output)
    return 0
