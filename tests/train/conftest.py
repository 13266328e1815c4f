"""What several tests of training need."""

import subprocess

import pytest


@pytest.fixture
def small_disk(tmp_path, request):
    """A filesystem of `request.param` (say "3m"); skips where none can be mounted."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", tmp_path]
    mounted = subprocess.run(mount, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small filesystem can be mounted: {mounted.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)
