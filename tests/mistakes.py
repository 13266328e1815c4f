"""A mistake of the user's, as the command line answers it."""

from jaxllm.cli.main import main


def mistake(argv: list[str], capsys) -> str:
    """What stderr says; asserts that it is a user's mistake, said in one or two lines."""
    code = main(argv)
    said = capsys.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said
    assert 1 <= len(said.strip().splitlines()) <= 2, said
    return said
