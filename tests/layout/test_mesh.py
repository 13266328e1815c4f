import jax
import pytest

from jaxllm.layout.mesh import in_order


@pytest.mark.parametrize(("platform", "devices", "waits"), [("cpu", 1, 0), ("cpu", 2, 1), ("gpu", 2, 0)])
def test_programs_of_several_cpu_devices_run_one_after_the_other(platform, devices, waits, monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    assert in_order(["state"]) == ["state"]
    assert len(waited) == waits
