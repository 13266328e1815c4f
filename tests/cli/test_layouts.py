"""`jaxllm layouts`: the list, the reasons, the table."""

import json

import pytest

from jaxllm.cli.main import main
from jaxllm.plan import measure as measuring

FILE = """
from jaxllm.train.config import base_config

def get_config():
    config = base_config()
    config.model.update(num_layers=2, embed_dim=32, num_heads=4, vocab_size=64, max_length=16)
    config.data.update(batch_size=8)
    config.train.update(steps=200)
    return config
"""


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(FILE)
    return f"--config={path}"


def layouts(capsys, *argv, code=0):
    assert main(["layouts", *argv]) == code
    return capsys.readouterr()


def test_a_list_of_flags_and_bytes(experiment, capsys):
    out = layouts(capsys, experiment, "--devices=4").out.splitlines()
    assert "bytes a device at rest" in out[0]
    lines = {" ".join(line.split()[1:]): int(line.split()[0].replace(",", "")) for line in out[1:]}
    assert len(lines) == len(out) - 1 > 20
    whole, split = lines["--config.mesh.replica=4"], lines["--config.mesh.data=4"]
    assert whole / 4 <= split < whole / 3.5
    assert "--config.mesh.pipeline=2 --config.mesh.data=2 --config.layout.schedule=gpipe" in lines
    assert not any("pipeline=4" in flags for flags in lines)  # two layers


def test_what_is_written_can_be_typed(experiment, capsys):
    """The flags of each layout, put on the command line, give one layout: the config as it is."""
    out = layouts(capsys, experiment, "--devices=4", "--vary=mesh,sequence_parallel").out.splitlines()
    for line in out[1::3]:
        again = layouts(capsys, experiment, "--devices=4", "--vary=zero_stage", *line.split()[1:]).out.splitlines()
        assert again[1].split("  ")[-1] == "(the config as it is)"
        assert again[1].split()[0] == line.split()[0]


def test_reasons(experiment, capsys):
    said = layouts(capsys, experiment, "--devices=8", "--illegal", "--vary=mesh").out
    assert "config.model.num_heads=4 is not divisible by config.mesh.model=8" in said
    assert "config.model.num_layers=2 is less than the 4 stages of the pipeline" in said
    assert "such as --config.mesh.pipeline=4" in said


def test_json(experiment, capsys):
    answer = json.loads(layouts(capsys, experiment, "--devices=2", "--illegal", "--vary=mesh", "--json").out)
    assert answer["devices"] == 2
    assert all(entry["bytes_at_rest"] > 0 for entry in answer["legal"])
    assert ["--config.mesh.data=2"] in [entry["flags"] for entry in answer["legal"]]
    assert all(entry["reason"] for entry in answer["illegal"])


def test_no_legal_layout_is_a_failure(experiment, capsys):
    said = layouts(capsys, experiment, "--devices=7", "--vary=mesh", code=1)
    assert "0 legal layouts of 7 devices" in said.err


def test_a_vocabulary_not_known_yet(experiment, capsys):
    unknown = [experiment, "--devices=1", "--config.model.vocab_size=0"]
    assert "32,000 pieces stand in" in layouts(capsys, *unknown, "--config.data.tokenizer=no.model").err
    said = layouts(capsys, *unknown, "--config.data.tokenizer=no.model", "--measure", code=2).err
    assert "no.model is not there. Say how many pieces: --config.model.vocab_size=32000" in said
    small, large = (layouts(capsys, *unknown, f"--config.data.tokenizer=bpe:{n}").out for n in (400, 800))
    sizes = [int(out.splitlines()[1].split()[0].replace(",", "")) for out in (small, large)]
    assert sizes[1] - sizes[0] == 400 * 32 * 12


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "say which model: --config FILE.py"),
        (["--config=x.py"], "say on how many devices: --devices N"),
        (["--config=x.py", "--devices=0"], "--devices N, 1 or more"),
        (["--config=x.py", "--devices=2", "--steps=0"], "--steps=0 must be 1 or more"),
        (["--config=x.py", "--devices=2"], "no such file"),
    ],
)
def test_mistakes(argv, says, capsys):
    assert says in layouts(capsys, *argv, code=2).err


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.num_heads=0", "config.model.num_heads=0 must be 1 or more"),
        ("model.embed_dim=33", "embed_dim=33 is not divisible by num_heads=4"),
        ("train.steps=5", "do not fit into config.train.steps=5"),
    ],
)
def test_mistakes_that_no_layout_mends(experiment, override, says, capsys):
    assert says in layouts(capsys, experiment, "--devices=2", f"--config.{override}", code=2).err


def test_fields_that_do_not_vary(experiment, capsys):
    said = layouts(capsys, experiment, "--devices=2", "--vary=mesh,remit", code=2).err
    assert "--vary remit: not a field that varies. Did you mean 'remat'?" in said


def test_measured(experiment, capsys, monkeypatch):
    """In processes of their own; one ends like a program that XLA aborts, and the others are timed all the same."""
    monkeypatch.setattr(measuring, "measure", ends_where_model_is_split)
    said = layouts(capsys, experiment, "--devices=2", "--vary=mesh", "--measure", "--steps=1")
    rows = [line for line in said.out.splitlines() if not line.startswith("failed")]
    assert "tokens/s" in rows[0]
    speeds = [float(row.split()[0].replace(",", "")) for row in rows[1:] if row.split()[0][0].isdigit()]
    assert len(speeds) == 4 and speeds == sorted(speeds, reverse=True) and min(speeds) > 0
    assert "failed: the process ended with exit code 3\n    --config.mesh.model=2" in said.out
    assert "] failed: the process ended with exit code 3  --config.mesh.model=2" in said.err
    assert "[5/5]" in said.err


def ends_where_model_is_split(config, num_devices, steps):
    import os

    from jaxllm.plan.measure import measure

    if config.mesh.model > 1:
        os._exit(3)
    return measure(config, num_devices, steps)
