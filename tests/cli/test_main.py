"""The console script: help, verbs, exit codes."""

import subprocess
import sys

import pytest

from jaxllm.cli import main as console
from jaxllm.errors import UserError


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from jaxllm.cli.main import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, check=False)


def test_help_names_every_verb_and_needs_no_jax():
    program = "import sys; from jaxllm.cli.main import main; main(['--help']); sys.exit(7 * ('jax' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in console.VERBS:
        assert verb in done.stdout


def test_help_of_train_needs_no_jax():
    program = (
        "import sys; from jaxllm.cli.main import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.exit(7 if 'jax' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--workdir" in done.stdout


def test_a_mistake_is_one_line_and_exit_code_2():
    done = run("trian", "--workdir", "x")
    assert done.returncode == 2
    assert done.stderr == "jaxllm: 'trian' is not a verb. Did you mean 'train'?\n"


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [(UserError("no"), 2, "jaxllm: no\n"), (KeyboardInterrupt(), 130, "jaxllm: interrupted\n")],
)
def test_exit_codes(monkeypatch, capsys, raised, code, said):
    def fail(argv):
        raise raised

    monkeypatch.setattr(console, "_dispatch", fail)
    assert console.main(["train"]) == code
    assert capsys.readouterr().err == said


def test_our_own_mistakes_keep_their_traceback(monkeypatch, capsys):
    def fail(argv):
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr(console, "_dispatch", fail)
    assert console.main(["train"]) == 70
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last)") and "in fail" in said
    assert said.endswith("jaxllm: ZeroDivisionError: of ours\n")
