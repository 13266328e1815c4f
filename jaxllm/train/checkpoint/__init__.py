"""Checkpoints of a run: what is saved, how it is written in the background, and what is found damaged."""
