"""A run in a bucket: killed in a save, it goes on elsewhere, bit for bit; and every verb reads it."""

import json
import signal
import sys
from pathlib import Path

import pytest

from jaxllm.cli.config_file import model_of_run
from jaxllm.cli.main import main
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.remote.copy import fresh_copy, local_copy
from jaxllm.remote.storage import filesystem
from jaxllm.train.checkpoint.checkpoints import Checkpoints
from jaxllm.train.initial import newest_identity

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
def gone_on(store, text, on_disk) -> str:
    """A run that was killed in a save, and started again by a process that has nothing of it but the address.

    Of one store; to the other the run on the disk is copied.
    """
    url = f"{store[0]}://bucket/killed"
    if store[0] == "gs":
        filesystem(url).put(f"{on_disk}/", f"{url}/", recursive=True)
        return url
    child = tiny_run.start(url, text, *STEPS, **{tiny_run.KILL_AT_COMMIT: "8"})
    said = child.communicate()
    assert child.returncode == -signal.SIGKILL, said
    assert filesystem(url).exists(f"{url}/checkpoints/8/params/_METADATA")
    assert Checkpoints(f"{url}/checkpoints").steps() == [4]
    run(url, text)
    return url


def run(workdir, text) -> None:
    child = tiny_run.start(workdir, text, *STEPS)
    said = child.communicate()
    assert child.returncode == 0, said


def test_goes_on_as_if_nothing_had_happened(gone_on, on_disk):
    if gone_on.startswith("gs:"):
        pytest.skip("killed and gone on with in the other store alone, as it takes its time")
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

    flags = ("generate", "--prompt=the cat", "--max_new_tokens=5", "--temperature=0")
    assert says(gone_on, *flags) == says(on_disk, *flags)
    assert says(gone_on, "report") == f"{gone_on}/report.html\n"
    assert b"<html" in filesystem(gone_on).cat_file(f"{gone_on}/report.html")
    assert main(["runs", gone_on, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == "done"


def test_another_run_can_start_from_it(gone_on, on_disk):
    assert model_of_run(gone_on) == model_of_run(str(on_disk))
    assert newest_identity(local_copy(gone_on)) == newest_identity(on_disk)
    tokenizers = [load_tokenizer(f"{run}/tokenizer") for run in (gone_on, on_disk)]
    assert tokenizers[0].fingerprint == tokenizers[1].fingerprint


def test_a_small_file_is_fetched_once(gone_on):
    folder = local_copy(gone_on)
    (folder / "config.json").write_text("{}")
    assert (local_copy(gone_on) / "config.json").read_text() == "{}", "what is here may be newer"
    assert json.loads((fresh_copy(gone_on) / "config.json").read_text())["train"]["steps"] == 12
    assert not (folder / "checkpoints").exists() and not (folder / "tensorboard").exists()
