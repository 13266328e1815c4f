"""Texts that the model itself writes, what they are worth, and the batches that are made of them."""
