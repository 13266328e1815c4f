"""`jaxllm report`: a page of one run, or of several side by side."""

from collections.abc import Sequence
from pathlib import Path

from jaxllm.cli.flags import Parser
from jaxllm.errors import UserError
from jaxllm.remote.copy import local_copy, push
from jaxllm.remote.place import with_addresses
from jaxllm.remote.storage import refuse_remote

EXAMPLES = """\
  jaxllm report --workdir runs/sanguo
  jaxllm report --workdir runs/sanguo --workdir runs/sanguo_long --out compared.html

One HTML file that needs nothing else, written to WORKDIR/report.html (of several, the first one's) if --out does not
say where. Its path is printed."""


def main(argv: list[str]) -> int:
    """Runs the verb; `argv` is what follows it. Returns the exit code."""
    parser = Parser("report", "Draws a run, or several over each other, on a page.", EXAMPLES)
    parser.add_argument("--workdir", action="append", metavar="DIR", help="a run; more of them by more --workdir")
    parser.add_argument("--out", default="", metavar="FILE.html", help="default: WORKDIR/report.html")
    options = parser.parse(argv)
    if not options.workdir:
        raise UserError("say which run: --workdir DIR, the folder that `jaxllm train --workdir DIR` wrote.")
    folders = [local_copy(name) for name in dict.fromkeys(options.workdir)]
    refuse_remote(options.out, "--out")
    file = Path(options.out) if options.out else folders[0] / "report.html"
    _write(file, folders)
    if not options.out:
        _push(file)
    print(with_addresses(str(file)))
    return 0


def _write(file: Path, folders: Sequence[Path]) -> None:
    from jaxllm.report.page import page, with_names_apart
    from jaxllm.report.run import read_run

    text = page(with_names_apart([read_run(folder) for folder in folders]))
    try:
        file.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}. Say where else: --out FILE.html.") from None


def _push(file: Path) -> None:
    """To where the run is, where that is in a bucket."""
    try:
        push(file.parent)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error}. Say where else: --out FILE.html.") from None
