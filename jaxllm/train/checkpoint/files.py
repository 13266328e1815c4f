"""The files of a checkpoint: STEP/files.json lists them with their sizes, and the small ones with their checksums.

So a torn checkpoint is known before anything of it is parsed. What is in the large files, the arrays, is held against
hashes of its content as it is restored (train/checkpoint/tree_hash.py): those files are read once.
"""

import json
import zlib

from jaxllm.train.checkpoint.places import FILES, Place

SMALL = 2**20  # bytes


def list_files(place: Place, step: int) -> None:
    """Writes the list. A checkpoint that was whole before this, and never got its list, is one without a list."""
    sizes = place.sizes(step)
    small = place.read(step, [name for name, size in sizes.items() if size <= SMALL])
    found = {name: (size, zlib.crc32(small[name]) if name in small else None) for name, size in sizes.items()}
    place.write(step, FILES, json.dumps(found, indent=0).encode())


def damage_of(place: Place, step: int) -> str | None:
    """What is wrong with the files, where something is and the list tells."""
    sizes = place.sizes(step)
    if FILES not in sizes:
        return None
    try:
        listed = json.loads(place.read(step, [FILES])[FILES])
        expected = {name: (int(size), crc) for name, (size, crc) in listed.items()}
    except (ValueError, TypeError, AttributeError) as error:
        return f"{FILES} cannot be read: {error}"
    for name, (size, _) in expected.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != size:
            return f"{name} has {sizes[name]:,} bytes, not the {size:,} that were written"
    checksums = {name: crc for name, (_, crc) in expected.items() if crc is not None}
    for name, data in place.read(step, list(checksums)).items():
        if zlib.crc32(data) != checksums[name]:
            return f"{name} has another checksum than when it was written"
    return None
