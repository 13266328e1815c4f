"""The main job from the command line: raw text, training, checkpoint, text. And what breaks it on the way."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.cli.main import main

ROOT = Path(__file__).parents[2]
CONFIG = """
from jaxllm.train.config import base_config

def get_config():
    config = base_config()
    config.model.update(num_layers=1, embed_dim=16, num_heads=2, max_length=16, positions="rope")
    config.data.update(path={text!r}, cache={cache!r}, tokenizer="bpe:320", held_out="0.1", batch_size=8)
    config.precision.update(compute="float32")
    config.optimizer.update(warmup_steps=1, learning_rate=1e-2)
    config.train.update(steps=4, log_every=1, eval_every=2, checkpoint_every=2)
    return config
"""
TEXT = "却说曹操引兵追赶，玄德大惊。the quick brown fox jumps over the lazy dog\n" * 40


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with text.txt, config.py and run/, trained for 4 steps on 8 devices. Not to be written to."""
    folder = tmp_path_factory.mktemp("spine")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    config = CONFIG.format(text=str(folder / "text.txt"), cache=str(folder / "cache"))
    (folder / "config.py").write_text(config, encoding="utf-8")
    argv = ["train", f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}", "--config.mesh.model=2"]
    assert main(argv) == 0
    return folder


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def again(trained: Path, workdir: Path, *flags: str) -> list[str]:
    return ["train", f"--config={trained / 'config.py'}", f"--workdir={workdir}", "--config.mesh.model=2", *flags]


def mistake(argv: list[str], capsys, lines: int = 2) -> str:
    code = main(argv)
    said = capsys.readouterr().err.split("jaxllm: ", 1)[-1]
    assert code == 2, said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) <= lines, said
    return said


def test_from_text_to_text(trained, capsys):
    records = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert main(["generate", f"--workdir={trained / 'run'}", "--prompt=却说", "--max_new_tokens=5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "却说"
    argv = ["evaluate", f"--workdir={trained / 'run'}", f"--input={trained / 'text.txt'}", "--json"]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["step"] == 4
    assert result["characters"] == len(TEXT)


def in_two_processes(argv: list[str], *flags: str) -> subprocess.CompletedProcess:
    """`jaxllm` by launch/local.py, with 4 devices a process."""
    command = [ROOT / "launch" / "local.py", "--devices=4", f"--jaxllm={sys.executable} -m jaxllm", *flags, "--", *argv]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)


def test_two_processes_train_what_one_does(trained, tmp_path):
    """Against one process with as many devices."""
    done = in_two_processes(again(trained, tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done: ") == 1  # the first process speaks for both
    for name in ("loss", "grad_norm", "eval_loss"):
        one, two = (column(folder / "metrics.jsonl", name) for folder in (trained / "run", tmp_path / "two"))
        assert len(one) == (2 if name == "eval_loss" else 4)
        assert two == pytest.approx(one, rel=1e-5)


def test_no_process_waits_for_one_that_could_not_prepare_the_data(trained, tmp_path):
    """Only the first reads the text. The others hear of its failure, instead of a barrier that JAX ends by SIGABRT."""
    done = in_two_processes(again(trained, tmp_path / "two", "--config.data.held_out=QUAGGA"))
    assert done.returncode == 2, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("jaxllm: ")]
    assert sorted(told, key=len)[0] == "jaxllm: process 1: process 0 could not prepare the data; it says why."
    assert len(told) == 2 and any("'QUAGGA' is nowhere in the text" in line for line in told)
    assert "Check failure" not in done.stderr and "Traceback" not in done.stderr


def column(file: Path, name: str) -> list[float]:
    return [r[name] for line in file.read_text().splitlines() if (r := json.loads(line)).get(name) is not None]


def test_evaluate_agrees_with_the_run(trained, capsys, tmp_path):
    """The held-out part of the text, scored by `evaluate`, costs what the run's last evaluation said."""
    held_out = TEXT[TEXT.index("\n", int(len(TEXT) * 0.9)) + 1 :]
    (tmp_path / "held_out.txt").write_text(held_out, encoding="utf-8")
    argv = ["evaluate", f"--workdir={trained / 'run'}", f"--input={tmp_path / 'held_out.txt'}", "--json"]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    last = json.loads((trained / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["bits_per_character"] == pytest.approx(last["eval_bits_per_char"], rel=0.05)


def test_a_finished_run_has_nothing_to_do(trained, copy, capsys):
    before = (copy / "metrics.jsonl").read_text()
    assert main(again(trained, copy)) == 0
    assert (copy / "metrics.jsonl").read_text() == before


def test_a_workdir_of_another_model_names_the_field(trained, copy, capsys):
    said = mistake(again(trained, copy, "--config.model.num_layers=2"), capsys, lines=4)
    assert "config.model.num_layers: 1 in the checkpoint, 2 now" in said
    assert "--workdir" in said


def test_a_tokenizer_of_another_size(trained, copy, capsys):
    said = mistake(again(trained, copy, "--config.data.tokenizer=bpe:300"), capsys, lines=4)
    assert "config.data.tokenizer: 'bpe:320' in the checkpoint, 'bpe:300' now" in said


def test_a_vocabulary_below_the_tokenizers(trained, tmp_path, capsys):
    said = mistake(again(trained, tmp_path / "new", "--config.model.vocab_size=100"), capsys)
    assert "config.model.vocab_size=100 is below the 320 pieces of the tokenizer" in said


@pytest.mark.parametrize("damage", ["truncated", "half deleted"])
def test_the_checkpoint_before_a_damaged_one_is_used_and_this_is_said(copy, damage, capsys):
    newest = copy / "checkpoints" / "4"
    largest = max((file for file in (newest / "params").rglob("*") if file.is_file()), key=lambda f: f.stat().st_size)
    if damage == "truncated":
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    else:
        shutil.rmtree(newest / "params")
    assert main(["generate", f"--workdir={copy}", "--prompt=the", "--max_new_tokens=2"]) == 0
    said = capsys.readouterr().err
    assert "The checkpoint of step 4 is damaged and skipped" in said
    assert "Trying the one before it, of step 2." in said
    assert "Traceback" not in said


def test_no_checkpoint_can_be_read(copy, capsys):
    for step in ("2", "4"):
        shutil.rmtree(copy / "checkpoints" / step / "params")
    code = main(["generate", f"--workdir={copy}", "--prompt=the"])
    said = capsys.readouterr().err
    assert code == 2
    assert "None of the 2 checkpoints in" in said
    assert "Traceback" not in said


INPUTS = {
    "missing": ("text", None, "text.txt"),
    "empty": ("text", b"", "the file is empty"),
    "not UTF-8": ("text", "却说".encode() + b"\xff\xfe" + "曹操".encode(), "byte 6"),
    "binary": ("text", b"\x7fELF\x00\x00\x01\x02" * 9, "text.txt"),
    "broken jsonl": ("jsonl", b'{"text": "a"}\n{"text": \n', "text.txt:2"),
    "missing field": ("jsonl", b'{"text": "a"}\n{"body": "b"}\n', "text.txt:2"),
}


@pytest.mark.parametrize(("source", "data", "says"), INPUTS.values(), ids=INPUTS.keys())
def test_inputs(trained, tmp_path, source, data, says, capsys):
    file = tmp_path / "text.txt"
    if data is not None:
        file.write_bytes(data)
    flags = [f"--config.data.path={file}", f"--config.data.source={source}"]
    said = mistake(again(trained, tmp_path / "new", *flags), capsys)
    assert says in said
    assert str(file) in said


def test_a_tokenizer_that_is_none(trained, tmp_path, capsys):
    said = mistake(again(trained, tmp_path / "new", f"--config.data.tokenizer={trained / 'text.txt'}"), capsys)
    assert "is not a sentencepiece model" in said


def test_unknown_source(trained, tmp_path, capsys):
    said = mistake(again(trained, tmp_path / "new", "--config.data.source=jsnl"), capsys)
    assert "Did you mean 'jsonl'?" in said
