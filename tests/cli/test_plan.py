"""`jaxllm plan`: every config that comes with jaxllm, what is printed, the page, the search, and mistakes."""

import json
import os
from pathlib import Path

import pytest

from jaxllm.cli import plan
from jaxllm.cli.main import main
from jaxllm.plan import gpu_free

CONFIGS = Path(__file__).parents[2] / "configs"
# One of each kind is compiled here, BLOOM in tests/plan/test_compiled.py; the others are counted.
COMPILED = ("bert_base.py", "dpo.py", "gpt2_small.py", "llama3_8b.py", "ppo.py", "prefix_tuning.py", "qlora.py")
needs_plugin = pytest.mark.skipif(bool(gpu_free.missing()), reason=gpu_free.missing() or "-")
SMALL = [
    "--config.model.num_layers=4",
    "--config.model.vocab_size=1024",
    "--config.data.length=512",
    "--config.mesh.model=2",
]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the verb sets for its own process is not left to other tests."""
    for name in ("JAX_PLATFORMS", "XLA_FLAGS", "PJRT_NPROC"):
        monkeypatch.setenv(name, os.environ[name])


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


@needs_plugin
@pytest.mark.parametrize("name", sorted(file.name for file in CONFIGS.glob("*.py")))
def test_every_config_fits_its_cluster(name, capsys):
    """Whatever the step."""
    quick = [] if name in COMPILED else ["--quick"]
    code, out, _ = run(capsys, "--config", str(CONFIGS / name), "--json", *quick)
    answer = json.loads(out)
    assert code == 0 and answer["fits"], answer["estimate"]["memory"]
    assert answer["estimate"]["time"]["total"] > 0 and 0 < answer["estimate"]["mfu"] < 1
    if not quick:
        assert answer["compiled"]["memory"]["total"] > 0


@needs_plugin
def test_what_is_printed(capsys):
    code, out, _ = run(capsys, "--config", str(CONFIGS / "llama3_8b.py"), *SMALL)
    assert code == 0
    for part in (
        "on 64 GPUs of h100x8: data=32 x model=2, ZeRO 3",
        "as XLA laid them out for 64 x NVIDIA H100 80GB HBM3",
        "usable of 84.98 GB: fits",
        "largest temporaries:",
        "traffic a step and GPU:",
        "by formula",
        "tokens/s",
        "GPU-hours (20 tokens a parameter at work)",
    ):
        assert part in out, part
    assert any("all-gather" in line and " network " in line for line in out.splitlines())
    assert any("all-reduce" in line and " node " in line for line in out.splitlines())


@needs_plugin
def test_the_page_needs_nothing_else(capsys, tmp_path):
    page = tmp_path / "plan.html"
    pipeline = ["--config.mesh.pipeline=2", "--config.layout.num_microbatches=8"]
    arguments = ["--config", str(CONFIGS / "llama3_8b.py"), *SMALL, *pipeline, "--html", str(page)]
    assert run(capsys, *arguments)[0] == 0
    text = page.read_text()
    for part in ("Memory of a GPU", "Traffic of a GPU by link", "Schedule", "Where each parameter lies", "<svg"):
        assert part in text, part
    assert "layers.mlp.down.kernel" in text and "tick 0, stage 0: F of microbatch 0" in text
    assert "http" not in text and "src=" not in text


def test_without_the_plugin_virtual_devices_stand_in(capsys, monkeypatch):
    monkeypatch.setattr(gpu_free, "missing", lambda: gpu_free.MISSING)
    arguments = ["--config", str(CONFIGS / "quickstart.py"), "--gpus", "8", "--config.model.vocab_size=512"]
    code, out, err = run(capsys, *arguments, "--config.data.batch_size=16")
    assert code == 0 and "for 8 virtual CPU devices" in out
    assert "the extra `plan` is not installed (pip install 'jaxllm[plan]'): virtual CPU devices stand in" in err


def test_more_tokens_take_longer(capsys):
    arguments = ["--config", str(CONFIGS / "llama3_8b.py"), "--quick", "--json"]
    short, long = (json.loads(run(capsys, *arguments, "--tokens", n)[1])["estimate"] for n in ("1e11", "2e11"))
    assert long["gpu_hours"] == pytest.approx(2 * short["gpu_hours"])


def test_a_search_ranks_what_fits(capsys):
    """Fastest first, each with the flags that make it; on fewer and smaller cards other layouts win."""
    arguments = ["--config", str(CONFIGS / "llama3_8b.py"), "--search", "--quick", "--json", "--top", "4"]
    code, out, err = run(capsys, *arguments, "--cluster", "a100-40gx8", "--gpus", "16")
    found = json.loads(out)
    assert code == 0 and len(found) == 4 and "layouts counted" in err
    times = [row["estimate"]["time"]["total"] for row in found]
    assert times == sorted(times) and all(row["fits"] for row in found)
    assert all("--config.mesh" in row["flags"] for row in found)
    best = found[0]["flags"].split()
    again = json.loads(
        run(capsys, *arguments[:2], *best, "--quick", "--json", *["--cluster", "a100-40gx8", "--gpus", "16"])[1]
    )
    assert again["estimate"]["time"]["total"] == pytest.approx(times[0])


@needs_plugin
def test_the_first_of_a_search_are_compiled(capsys):
    arguments = ["--config", str(CONFIGS / "llama3_8b.py"), "--search", "--top", "1", "--gpus", "8", *SMALL]
    code, out, _ = run(capsys, *arguments, "--config.data.batch_size=16")
    assert code == 0 and out.splitlines()[1].split()[5].replace(".", "").isdigit()


def test_the_mixture_of_experts_finds_a_layout_on_1024_gpus(capsys):
    """1.75 trillion parameters."""
    arguments = [
        "--config",
        str(CONFIGS / "moe_1t.py"),
        "--search",
        "--quick",
        "--json",
        "--top",
        "1",
        "--gpus",
        "1024",
    ]
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and json.loads(out)[0]["fits"]


WRONG = {
    "cluster": (["--cluster", "h100x9"], r"--cluster=h100x9: not a cluster\. Did you mean 'h100x8'"),
    "nodes": (["--gpus", "12"], r"--gpus=12 is not a multiple of the 8 of a node"),
    "mesh": (["--gpus", "8", "--config.mesh.model=3"], r"does not divide the 8 devices"),
    "heads": (["--gpus", "56", "--config.mesh.model=7"], r"num_heads=32"),
    "flag": (["--searh"], r"--searh is not a flag of jaxllm plan\. Did you mean '--search'"),
    "top": (["--top", "0"], r"--top=0 must be 1 or more"),
    "page": (["--quick", "--html", "/nowhere/plan.html"], r"--html /nowhere/plan.html"),
}


@pytest.mark.parametrize(("arguments", "says"), WRONG.values(), ids=WRONG.keys())
def test_mistakes(arguments, says, capsys):
    import re

    code, _, err = run(capsys, "--config", str(CONFIGS / "llama3_8b.py"), *arguments)
    assert code == 2 and re.search(says, err), err
    assert "Traceback" not in err


def test_what_cannot_fit(capsys):
    """By how much, and what would make it fit: alone with code 1, in a search with the smallest there is."""
    arguments = ["--config", str(CONFIGS / "moe_1t.py"), "--quick", "--gpus", "8"]
    own = [
        "--config.mesh.pipeline=1",
        "--config.mesh.expert=8",
        "--config.mesh.model=1",
        "--config.data.batch_size=512",
    ]
    code, out, _ = run(capsys, *arguments, *own)
    assert code == 1 and "does not fit: " in out and " too much" in out
    code, _, err = run(capsys, *arguments, *own, "--search")
    assert code == 1 and "no layout fits: the smallest needs" in err and "What would make it fit: about" in err


def test_no_config(capsys):
    assert plan.main.__doc__ and run(capsys)[0] == 2
