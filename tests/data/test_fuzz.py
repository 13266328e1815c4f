"""A sample of the campaign of tests/fuzz_data.py: every spoilt file is read, or refused by name."""

from tests.fuzz_data import Case, cases, try_case
from tests.fuzz_files import KINDS


def test_a_spoilt_file_is_read_or_refused(tmp_path):
    failures, kinds = [], set()
    for number, case in cases(seed=20, count=4 * len(KINDS)):
        outcome = try_case(case, tmp_path / "files")
        kinds.add(outcome.kind)
        if outcome.kind == "failed":
            failures.append(f"case {number}, {case.kind} {case.how}: {outcome.said}")
    assert not failures, "\n\n".join(failures)
    assert kinds == {"valid", "refused"}


def test_a_file_that_is_not_spoilt_is_read(tmp_path):
    outcomes = {kind.name: try_case(Case(kind.name, [], "0"), tmp_path / "files") for kind in KINDS}
    assert {name: outcome for name, outcome in outcomes.items() if outcome.kind != "valid"} == {}
