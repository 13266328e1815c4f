"""The files of a checkpoint: STEP/files.json lists them with their sizes, and the small ones with their checksums.

So a torn checkpoint is known before anything of it is parsed. What is in the large files, the arrays, is held against
hashes of its content as it is restored (train/checkpoint/tree_hash.py): those files are read once.
"""

import json
import zlib
from pathlib import Path

FILES = "files.json"
SMALL = 2**20  # bytes


def list_files(folder: Path) -> None:
    """Writes the list. A checkpoint that was whole before this, and never got its list, is one without a list."""
    found = {str(path.relative_to(folder)): _described(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    new = folder / f"{FILES}.new"
    new.write_text(json.dumps(found, indent=0), encoding="utf-8")
    new.replace(folder / FILES)


def damage_of(folder: Path) -> str | None:
    """What is wrong with the files, where something is and the list tells."""
    listed = folder / FILES
    if not listed.is_file():
        return None
    try:
        expected = {name: (int(size), crc) for name, (size, crc) in json.loads(listed.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        return f"{FILES} cannot be read: {error}"
    for name, (size, crc) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, not the {size:,} that were written"
        if crc is not None and crc != zlib.crc32(path.read_bytes()):
            return f"{name} has another checksum than when it was written"
    return None


def _described(path: Path) -> tuple[int, int | None]:
    size = path.stat().st_size
    return size, zlib.crc32(path.read_bytes()) if size <= SMALL else None
