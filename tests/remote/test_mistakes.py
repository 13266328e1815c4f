"""What can be wrong with an address is said in a line or two, before anything is compiled."""

import pytest

from jaxllm.data.shards import cache_folder
from jaxllm.data.sources import open_source
from jaxllm.errors import UserError
from jaxllm.remote import place, storage
from tests.mistakes import mistake

CONFIG = "--config=configs/quickstart.py"


def test_a_bucket_that_is_not_there(store, capsys):
    said = mistake(["train", CONFIG, f"--workdir={store[0]}://no-such-bucket/run"], capsys)
    assert f"there is no bucket {store[0]}://no-such-bucket" in said


def test_a_run_that_is_not_there(bucket, capsys):
    assert f"--workdir {bucket}: no such folder" in mistake(["generate", f"--workdir={bucket}", "--prompt=a"], capsys)


@pytest.mark.parametrize("verb", ["train", "generate", "report"])
def test_an_unknown_scheme(verb, capsys):
    flags = {"train": [CONFIG], "generate": ["--prompt=a"]}.get(verb, [])
    said = mistake([verb, *flags, "--workdir=hdfs://host/run"], capsys)
    assert "hdfs:// cannot be read or written; gs:// and s3:// can" in said


def test_text_by_an_unknown_scheme():
    with pytest.raises(UserError, match="https:// cannot be read or written"):
        open_source("text", "https://host/a.txt")


def test_a_token_cache_in_a_bucket():
    with pytest.raises(UserError, match=r"the token cache .* gs://bucket/cache is in a bucket"):
        cache_folder("gs://bucket/cache")


@pytest.mark.parametrize(
    "argv",
    [
        ["tokenizer", "--input=a.txt", "--vocab_size=300", "--out=gs://bucket/tokenizer"],
        ["convert", "--from=hf:models/llama", "--to=s3://bucket/run"],
        ["convert", "--from=hf:gs://bucket/llama", "--to=run"],
        ["report", "--workdir=run", "--out=gs://bucket/report.html"],
    ],
)
def test_what_is_not_written_to_a_bucket(argv, capsys):
    assert "is in a bucket" in mistake(argv, capsys)


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_package_that_is_missing(scheme, package, capsys, monkeypatch):
    import fsspec

    def missing(*_, **__):
        raise ImportError(package)

    monkeypatch.setattr(fsspec, "filesystem", missing)
    said = mistake(["generate", f"--workdir={scheme}://bucket/run", "--prompt=a"], capsys)
    assert f"needs the package {package}" in said and "pip install 'jaxllm[remote]'" in said


def test_no_right_to_write(store, monkeypatch):
    def refuses(*_, **__):
        raise PermissionError("Access Denied")

    url = f"{store[0]}://bucket/run"
    monkeypatch.setattr(storage.filesystem(url), "pipe_file", refuses)
    with pytest.raises(UserError, match=r"no access \(PermissionError: Access Denied\). Log in"):
        storage.check_writable(url)


@pytest.mark.parametrize("scheme", place.SCHEMES)
def test_addresses_and_the_folders_that_stand_for_them(scheme, tmp_path):
    assert (
        place.address(f"{scheme}:/bucket/run") == place.address(f"{scheme}://bucket/run/") == f"{scheme}://bucket/run"
    )
    assert place.address(tmp_path) is None and place.address_of(tmp_path) is None
    folder = place.folder_of(f"{scheme}://bucket/run")
    assert place.address_of(folder / "checkpoints") == f"{scheme}://bucket/run/checkpoints"
    assert (
        place.with_addresses(f"in {folder}/a.txt, and {tmp_path}") == f"in {scheme}://bucket/run/a.txt, and {tmp_path}"
    )
