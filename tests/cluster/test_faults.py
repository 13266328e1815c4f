"""A short campaign of faults; `python -m tests.faults` is the long one."""

import pytest

from tests import faults

SAMPLE = ["SIGKILL of process 1", "newest checkpoint: a bit changed", "SIGUSR1 of process 1"]


@pytest.fixture(scope="module")
def struck(tmp_path_factory):
    return {s.fault: s for s in faults.campaign(len(SAMPLE), 1, tmp_path_factory.mktemp("faults"), SAMPLE)}


@pytest.mark.parametrize("fault", SAMPLE)
def test_a_run_that_was_struck_ends_as_the_clean_one(struck, fault):
    assert struck[fault].verdict in faults.GOOD, struck[fault]
