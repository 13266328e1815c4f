"""A sample of the campaign of tests/fuzz_configs.py: every mutated config could run, or is refused clearly."""

import pytest

from tests.fuzz_configs import cases, command, make_files, try_case

COUNT = 96
PARTS = 4  # so that the workers of a test run share them
TRAIN_EVERY = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("part", range(PARTS))
def test_a_mutated_config_runs_or_is_refused(files, part):
    failures, kinds = [], []
    for case in cases(seed=20, count=COUNT, files=files)[part::PARTS]:
        outcome = try_case(case, files)
        kinds.append(outcome.kind)
        if outcome.kind == "valid" and kinds.count("valid") % TRAIN_EVERY == 1:
            outcome = try_case(case, files, trains=True)
        if outcome.kind == "failed":
            failures.append(f"{command(case, files)}\n{outcome.said}")
    assert not failures, "\n\n".join(failures)
    assert {"valid", "refused"} <= set(kinds)
