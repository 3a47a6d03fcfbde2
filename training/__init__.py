"""Trains the small LLaDA-V-layout model this project ships; `python -m training.train --help` is the way in."""
