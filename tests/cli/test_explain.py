"""`jaxllm explain`: where each tensor lies, and what each collective is for."""

import json
import re
from pathlib import Path

import pytest

from jaxllm.cli.main import main
from tests.mistakes import mistake

ROOT = Path(__file__).parents[2]
CONFIG = """
from jaxllm.train.config import base_config

def get_config():
    config = base_config()
    config.model.update(num_layers=4, embed_dim=64, num_heads=4, max_length=32, vocab_size=96, tied_head=False)
    config.data.update(batch_size=32, length=32)
    config.layout.num_microbatches = 4
    return config
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("explain") / "experiment.py"
    path.write_text(CONFIG)
    return str(path)


def explained(capsys, experiment: str, *flags: str) -> dict:
    assert main(["explain", f"--config={experiment}", "--devices=8", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_tensor(experiment, capsys):
    """Written out by hand: Megatron's rows of the mlp over model, ZeRO 1 over data, layers over pipeline."""
    mesh = ("--config.mesh.pipeline=2", "--config.mesh.data=2", "--config.mesh.model=2")
    (row,) = explained(capsys, experiment, *mesh, "--tensor=layers.mlp.down.kernel")["tensors"]
    assert row == {
        "tensor": "layers.mlp.down.kernel",
        "axes": {"layers": 4, "mlp": 256, "embed": 64},
        "compute": {"layers": "pipeline", "mlp": "model"},
        "at_rest": {"layers": "pipeline", "mlp": "model", "embed": "data"},
        "local_shape": [2, 128, 32],
        "bytes": 2 * 128 * 32 * 4,
        "optimizer_bytes": 2 * 2 * 128 * 32 * 4,
    }
    rows = explained(capsys, experiment, *mesh, "--tensor=the *")["tensors"]
    residual = next(row for row in rows if row["tensor"] == "the residual stream")
    assert residual["local_shape"] == [4, 32, 64] and residual["at_rest"] is None  # 32 rows / 4 microbatches / data=2
    assert residual["bytes"] == 2 * 4 * 32 * 64  # bfloat16


def test_a_step_with_a_batch_of_its_own(experiment, capsys):
    """Masked language modelling: the collectives of the compiled step are explained, the same activations listed."""
    mlm = ("--config.train_step=mlm", "--config.model.causal=false", "--config.mesh.data=8")
    answer = explained(capsys, experiment, *mlm)
    names = [row["tensor"] for row in answer["tensors"]]
    assert names == [row["tensor"] for row in explained(capsys, experiment, "--tensor=*")["tensors"]]
    assert any(row["mesh_axes"] == ["data"] for row in answer["collectives"])


LAYOUTS = {
    "data": ("--config.mesh.data=8",),
    "tensor": ("--config.mesh.model=4", "--config.layout.sequence_parallel", "--config.layout.zero_stage=3"),
    "pipeline": ("--config.mesh.pipeline=2", "--config.mesh.data=2", "--config.mesh.model=2"),
    "context": ("--config.mesh.context=4", "--config.mesh.data=2"),
}


@pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_collective_of_weight_has_a_line_and_an_axis(experiment, flags, capsys):
    rows = explained(capsys, experiment, "--collectives", *flags)["collectives"]
    total = sum(row["bytes"] * row["runs"] for row in rows)
    assert total > 0
    for row in rows:
        assert row["mesh_axes"] and (row["line"] == "" or (ROOT / "jaxllm" / row["line"].partition(":")[0]).exists())
    known = sum(row["bytes"] * row["runs"] for row in rows if row["line"] and row["logical_axes"])
    assert known >= 0.98 * total, [row for row in rows if not (row["line"] and row["logical_axes"])]


def test_what_tensor_parallelism_sends_is_at_the_lines_of_the_model(experiment, capsys):
    rows = explained(capsys, experiment, "--collectives", "--config.mesh.model=8", "--config.model.num_heads=8")
    rows = [row for row in rows["collectives"] if row["kind"] == "all-reduce" and row["shape"] == [8, 32, 64]]
    told = {(row["tensor"].rpartition(".")[0].rpartition(".")[2], *row["logical_axes"]) for row in rows}
    assert {("out", "heads"), ("down", "mlp"), ("table", "vocab")} <= told | {("table", "vocab")}
    lines = {row["tensor"]: row["line"] for row in rows}
    for tensor, call in (("layers.attention.out.kernel", "self.out("), ("layers.mlp.down.kernel", "self.down(")):
        file, _, number = lines[tensor].partition(":")
        assert call in (ROOT / "jaxllm" / file).read_text().splitlines()[int(number) - 1]
    assert sum(row["runs"] for row in rows if "layers." in row["tensor"]) == 4 * 4 * 4  # a layer and microbatch


def test_tables(experiment, capsys):
    assert main(["explain", f"--config={experiment}", "--devices=8", "--config.mesh.model=2"]) == 0
    tensors, collectives = capsys.readouterr().out.split("\n\n")
    assert re.match(r"tensor +axes +computed with +at rest +a device +bytes +optimizer\n", tensors)
    assert re.search(r"layers\.mlp\.up\.kernel +layers=4 embed=64 mlp=256 +mlp/model +embed/data, mlp/model", tensors)
    assert re.match(r"kind +over +for +of +at +a device +bytes +runs\n", collectives)
    assert re.search(r"all-reduce +model +mlp +layers\.mlp\.down\.kernel +model/mlp\.py:\d+ ", collectives)


def test_mistakes(experiment, capsys):
    argv = ["explain", f"--config={experiment}", "--devices=8"]
    assert "Nearest: layers.mlp.down.kernel" in mistake([*argv, "--tensor=layers.mlp.dwn.kernel"], capsys)
    assert "--devices=0 must be 1 or more" in mistake([*argv[:2], "--devices=0"], capsys)
    assert "which model: --config" in mistake(["explain"], capsys)
    assert "heads" in mistake([*argv, "--config.mesh.model=8"], capsys)
    assert "Say it instead: --config.model.vocab_size" in mistake(
        [*argv, "--config.model.vocab_size=0", "--config.data.tokenizer=nowhere"], capsys
    )
