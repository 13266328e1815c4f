import jax
import pytest

from jaxllm.layout.mesh import in_order


@pytest.mark.parametrize(("processes", "waits"), [(1, 0), (2, 1)])
def test_programs_of_several_cpu_processes_run_one_after_the_other(processes, waits, monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    assert in_order(["state"]) == ["state"]
    assert len(waited) == waits
