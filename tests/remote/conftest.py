"""A bucket of each kind, on this machine."""

import importlib.util
import uuid
from collections.abc import Iterator, Mapping

import pytest

from tests.remote import stand_ins

NEEDS = {"gs": ("gcsfs", "gcp_storage_emulator"), "s3": ("s3fs", "moto", "flask", "boto3")}


@pytest.fixture(scope="session", params=["gs", "s3"])
def store(request) -> Iterator[tuple[str, Mapping[str, str]]]:
    """(scheme, environment) of an object store. Skips where what it needs is not installed."""
    missing = [name for name in NEEDS[request.param] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{request.param}:// has no stand-in here: {', '.join(missing)} not installed (jaxllm[test])")
    with getattr(stand_ins, request.param)() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield request.param, environment


@pytest.fixture
def bucket(store) -> str:
    """An address that nothing else uses."""
    return f"{store[0]}://{stand_ins.BUCKET}/{uuid.uuid4().hex[:8]}"
