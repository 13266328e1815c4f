"""Ways to spoil a file: a value in what it holds, its bytes, or what lies in its place."""

import json
import os
import random
from pathlib import Path
from typing import Any

# What a JSON value is replaced by.
VALUES = (
    None,
    0,
    -1,
    3,
    1e300,
    float("nan"),
    float("inf"),
    True,
    "",
    " ",
    "x",
    [],
    {},
    [[]],
    [None],
    {"a": {}},
    "\ud800",
)
VALUES += ("\x00", 10**30, 4_000_000_000, -5.5, ["x", 1], {"role": 3}, "x" * 100_000, [{"role": "user"}], "{{", "<s>")


def spoil_value(draw: random.Random, content: Any) -> Any:
    """One value somewhere in JSON-like content is another, is gone, or has another name."""
    content = json.loads(json.dumps(content))
    holder, key = _pick(draw, content)
    if holder is None:
        return draw.choice(VALUES)
    way = draw.choice(("replace", "replace", "replace", "delete", "rename", "wrap"))
    if way == "replace":
        holder[key] = draw.choice(VALUES)
    elif way == "wrap":
        holder[key] = draw.choice((lambda v: [v], lambda v: {"x": v}, str))(holder[key])
    elif way == "delete" or isinstance(holder, list):
        del holder[key]
    else:
        holder[f"{key}_"] = holder.pop(key)
    return content


def _pick(draw: random.Random, content: Any) -> tuple[Any, Any]:
    """A place in nested lists and objects, each depth as likely as another."""
    holder, key = None, None
    while isinstance(content, (dict, list)) and content and (holder is None or draw.random() < 0.75):
        holder, key = content, draw.choice(list(content)) if isinstance(content, dict) else draw.randrange(len(content))
        content = holder[key]
    return holder, key


def spoil_bytes(draw: random.Random, data: bytes) -> bytes:
    at = draw.randrange(len(data) + 1)
    end = min(at + draw.choice((1, 3, 50)), len(data))
    flipped = bytearray(data)
    for _ in range(draw.choice((1, 1, 4, 40)) if data else 0):
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    ways = (
        bytes(flipped),
        bytes(flipped),
        data[:at],
        data[:at] + draw.randbytes(draw.choice((1, 4, 300))) + data[at:],
        data[:at] + data[end:],
        data[:end] + data[at:],
        data[:at]
        + draw.choice((b"\0", b"\xff", b"\xfe\xff", b"\xc3", b"\xed\xa0\x80", b"\r", b"\x1a", b'"'))
        + data[at:],
        data[:at] + b"[" * 100_000 + data[at:],
        data[:at] + b"a" * 300_000 + data[at:],
        data[:at] + b"9" * 10_000 + data[at:],
        b"\xef\xbb\xbf" + data,
        data.replace(b"\n", b"\r\n"),
        data.replace(b"\n", b""),
        data.decode("utf-8", "replace").encode("utf-16"),
        b"",
        b" \n\n ",
        b"null",
        b"[]",
        data + data,
        draw.randbytes(2_000),
        b"\x1f\x8b" + data,
        b"\x28\xb5\x2f\xfd" + data,
        b"PAR1" + data + b"PAR1",
    )
    return draw.choice(ways)


def place_other(draw: random.Random, path: Path) -> str:
    """Something that is no readable file in place of `path`; says what."""
    what = draw.choice(("folder", "nothing", "fifo", "link to itself", "link to nothing", "socket", "no rights"))
    if what != "no rights":
        path.unlink(missing_ok=True)
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "link to itself":
        path.symlink_to(path)
    elif what == "link to nothing":
        path.symlink_to(path.with_name("nothing"))
    elif what == "socket":
        os.mknod(path, 0o140644)
    elif what == "no rights":
        path.chmod(0)
    return what
