"""Runs as they lie on disk, to look at: a page of one or of several, a table of all. Nothing here needs JAX."""
