"""A run in a bucket: killed in a save, it goes on elsewhere, bit for bit; and every verb reads it."""

import json
import signal
import sys
from pathlib import Path

import pytest

from jaxllm.cli.main import main
from jaxllm.remote.copy import fresh_copy, local_copy
from jaxllm.remote.storage import filesystem
from jaxllm.train.checkpoint.checkpoints import Checkpoints
from jaxllm.train.checkpoint.places import COMMITTED

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import kill_campaign
import tiny_run

STEPS = ("train.steps=12", "train.checkpoint_every=4", "train.eval_every=12")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    tiny_run.write_text(file)
    return file


@pytest.fixture(scope="module")
def on_disk(text) -> Path:
    """A run that nobody killed."""
    workdir = text.parent / "on_disk"
    run(workdir, text)
    return workdir


@pytest.fixture(scope="module")
def killed(store, text) -> str:
    """A run in a bucket that was killed when only the last file of the checkpoint of step 8 was missing."""
    url = f"{store[0]}://bucket/killed"
    child = tiny_run.start(url, text, *STEPS, **{tiny_run.KILL_AT_COMMIT: "8"})
    said = child.communicate()
    assert child.returncode == -signal.SIGKILL, said
    return url


@pytest.fixture(scope="module")
def gone_on(killed, text) -> str:
    """The same started again by a process that has nothing of it but the address; the text is in the bucket, too."""
    left = filesystem(killed).ls(f"{killed}/checkpoints/8", detail=False)
    assert left and not any(name.endswith(COMMITTED) for name in left)
    assert Checkpoints(f"{killed}/checkpoints").steps() == [4]
    run(killed, text)
    return killed


def run(workdir, text) -> None:
    child = tiny_run.start(workdir, text, *STEPS)
    said = child.communicate()
    assert child.returncode == 0, said


def test_goes_on_as_if_nothing_had_happened(gone_on, on_disk):
    copy = fresh_copy(gone_on)
    assert kill_campaign.records(copy) == kill_campaign.records(on_disk)
    theirs = Checkpoints(f"{gone_on}/checkpoints").newest_run()
    ours = Checkpoints(on_disk / "checkpoints").newest_run()
    for name in ("parameter_hash", "state_hash", "metrics"):
        assert theirs[name] == ours[name], name
    assert json.loads((copy / "config.json").read_text())["train"]["steps"] == 12
    events = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] in ("started", "resumed", "done")] == [
        *("started", "resumed", "done")
    ]
    assert events[-1]["message"] == f"done: {gone_on}, checkpoint of step 12"
    assert filesystem(gone_on).ls(f"{gone_on}/tensorboard"), "what is for others is there, too"


def test_is_read_as_a_run_on_a_disk(gone_on, on_disk, capsys):
    def says(workdir, *flags: str) -> str:
        verb, *rest = flags
        assert main([verb, f"--workdir={workdir}", *rest]) == 0
        return capsys.readouterr().out

    for flags in (
        ("generate", "--prompt=the cat", "--max_new_tokens=5", "--temperature=0"),
        ("evaluate", f"--input={on_disk.parent / 'text.txt'}", "--json"),
    ):
        assert says(gone_on, *flags) == says(on_disk, *flags)
    assert says(gone_on, "report") == f"{gone_on}/report.html\n"
    assert b"<html" in filesystem(gone_on).cat_file(f"{gone_on}/report.html")
    assert main(["runs", gone_on, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == "done"


def test_another_run_starts_from_it(gone_on, text, tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(
        "from jaxllm.train.config import base_config\n"
        "def get_config():\n"
        "    config = base_config()\n"
        f"    config.data.update(path={str(text)!r}, cache={str(text.parent / 'cache')!r}, batch_size=8)\n"
        f"    config.data.update(held_out='0.02', tokenizer={gone_on + '/tokenizer'!r})\n"
        f"    config.train.update(steps=1, init_from={gone_on!r}, eval_batches=1)\n"
        "    config.precision.update(compute='float32')\n"
        "    return config\n"
    )
    workdir = tmp_path / "run"
    assert main(["train", f"--config={config}", f"--workdir={workdir}", f"--config.model={gone_on}"]) == 0
    assert f"parameters of {gone_on}, step 12" in capsys.readouterr().err
    assert (workdir / "tokenizer").is_dir()


def test_a_small_file_is_fetched_once(gone_on):
    folder = local_copy(gone_on)
    (folder / "config.json").write_text("{}")
    assert (local_copy(gone_on) / "config.json").read_text() == "{}", "what is here may be newer"
    assert json.loads((fresh_copy(gone_on) / "config.json").read_text())["train"]["steps"] == 12
    assert not (folder / "checkpoints").exists() and not (folder / "tensorboard").exists()
