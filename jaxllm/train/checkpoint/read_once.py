"""Each chunk of a checkpoint is read once, however many devices of this host need a part of it.

Orbax (0.12.8) gives TensorStore no cache for chunks: one that a second device asks for, after the first one's read has
ended, is read again. There is no public way to give it one.
"""

import contextlib
from collections.abc import Iterator

from orbax.checkpoint._src.serialization import tensorstore_utils

CACHE_BYTES = 2**31  # of the host, while arrays are restored


@contextlib.contextmanager
def chunks_kept() -> Iterator[None]:
    """What Orbax restores inside `with` keeps its chunks until it is done. An Orbax that is built otherwise may not."""
    context = getattr(tensorstore_utils, "_DEFAULT_OCDBT_TS_CONTEXT", None)
    if context is None or "cache_pool" in context:
        yield
        return
    context["cache_pool"] = {"total_bytes_limit": CACHE_BYTES}
    try:
        yield
    finally:
        del context["cache_pool"]
