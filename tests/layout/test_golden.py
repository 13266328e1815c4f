"""Where tensors lie is what the table in golden_shardings.txt says; `python -m tests.layout.golden` rewrites it."""

import difflib

from tests.layout.golden import FILE, table


def test_every_sharding_is_the_golden_one():
    written = FILE.read_text(encoding="utf-8").splitlines()
    changed = list(difflib.unified_diff(written, table().splitlines(), "golden", "now", lineterm="", n=1))
    assert not changed, "\n".join(changed[:40])


def test_the_table_has_what_megatron_says():
    """Shoeybi et al. 2019: columns, then rows; ZeRO 1 over data at rest. Written by hand."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    section = lines[lines.index("== megatron ZeRO 1: llama") :]
    down = next(line for line in section if line.startswith("layers.mlp.down.kernel"))
    whole = "layers/pipeline mlp/model embed"
    assert down == f"layers.mlp.down.kernel: {whole} | {whole} | layers/pipeline mlp/model embed/data"
