"""`jaxllm report` and `jaxllm runs`: files, what is printed, mistakes; neither waits for JAX."""

import json
import subprocess
import sys
import time

import pytest

from jaxllm.cli.main import main
from tests.mistakes import mistake
from tests.report.made_up import event, make_run, records


@pytest.fixture
def runs(tmp_path):
    """Two runs and an adapter."""
    for name in ("first", "second", "first/adapters/qa"):
        make_run(tmp_path / name, records(10), [event("started"), event("done", 100)])
    return tmp_path


def test_the_page_of_a_run(runs, capsys):
    assert main(["report", "--workdir", str(runs / "first")]) == 0
    assert capsys.readouterr().out == f"{runs}/first/report.html\n"
    assert "<h1>first</h1>" in (runs / "first/report.html").read_text()


def test_the_page_of_two(runs, capsys):
    out = runs / "both.html"
    folders = [f"--workdir={runs / name}" for name in ("first", "second", "first")]
    assert main(["report", *folders, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert "<h1>first · second</h1>" in out.read_text() and not (runs / "first/report.html").exists()


def test_the_table(runs, capsys):
    assert main(["runs", str(runs)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert "last activity" in head
    assert sorted(row.split()[0] for row in rows) == ["first", "first/adapters/qa", "second"]
    assert all(row.split()[1:3] == ["done", "100/100"] for row in rows)


def test_the_table_for_programs(runs, capsys):
    assert main(["runs", "--json", str(runs)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["run"], row["state"], row["step"]) for row in rows} == {
        ("first", "done", 100),
        ("second", "done", 100),
        ("first/adapters/qa", "done", 100),
    }


def test_neither_needs_jax(runs):
    program = (
        "import sys; from jaxllm.cli.main import main; "
        f"main(['runs', {str(runs)!r}]); main(['report', '--workdir', {str(runs / 'first')!r}]); "
        "sys.exit(7 * ('jax' in sys.modules or 'tensorboardX' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_long_run_is_drawn_soon(tmp_path):
    folder = make_run(tmp_path / "long", records(20_000))
    started = time.monotonic()
    assert main(["report", "--workdir", str(folder)]) == 0
    assert time.monotonic() - started < 10  # about one second on an idle core
    assert (folder / "report.html").stat().st_size < 1_000_000


def mistakes(folder) -> dict[str, tuple[list[str], str]]:
    return {
        "no run named": (["report"], "say which run: --workdir DIR"),
        "no folder": (["report", "--workdir", f"{folder}/none"], "no run is there: no config.json in it"),
        "a file": (["report", "--workdir", f"{folder}/first/config.json"], "no run is there"),
        "broken": (["report", f"--workdir={folder}/broken"], "config.json is broken: it is not JSON."),
        "no place": (["report", f"--workdir={folder}/first", "--out=/nowhere/x.html"], "/nowhere/x.html cannot be"),
        "flag": (["report", "--wrkdir=x"], "Did you mean '--workdir'?"),
        "no DIR": (["runs"], "say where the runs are: jaxllm runs DIR."),
        "DIR is none": (["runs", f"{folder}/none"], "no such folder"),
        "DIR is a file": (["runs", f"{folder}/first/config.json"], "a file, not a folder"),
        "two": (["runs", str(folder), "more"], "'more' is not expected here: after DIR every value follows its flag."),
        "flag of runs": (["runs", str(folder), "--jsn"], "Did you mean '--json'?"),
        "DIR without runs": (["runs", f"{folder}/empty"], "no run is there, or below"),
    }


@pytest.mark.parametrize("case", mistakes(""))
def test_mistakes(runs, case, capsys):
    (runs / "empty").mkdir()
    (runs / "broken").mkdir()
    (runs / "broken/config.json").write_text("{")
    argv, says = mistakes(runs)[case]
    assert says in mistake(argv, capsys)
