"""`jaxllm runs`: a table of the runs below a folder."""

import json
from pathlib import Path

from jaxllm.cli.flags import Parser
from jaxllm.errors import UserError
from jaxllm.remote.copy import local_copy

EXAMPLES = """\
  jaxllm runs runs
  jaxllm runs runs --json

States: running, done, preempted (saved; the same command goes on), stopped (for a reason that jaxllm report tells),
crashed, hung, silent (killed, or hangs), untrained (nothing was logged). Adapters are runs of their own."""


def main(argv: list[str]) -> int:
    """Runs the verb; `argv` is what follows it. Returns the exit code."""
    parser = Parser("runs", "Lists the runs below a folder, the newest first.", EXAMPLES, values="DIR")
    parser.add_argument("directory", nargs="?", metavar="DIR", help="the folder with the runs, or one run")
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects")
    options = parser.parse(argv)
    if not options.directory:
        raise UserError("say where the runs are: jaxllm runs DIR.")
    folder = local_copy(options.directory)
    if not folder.is_dir():
        raise UserError(f"{folder}: {'a file, not a folder' if folder.exists() else 'no such folder'}.")
    return _list(folder, options.json)


def _list(folder: Path, as_json: bool) -> int:
    from jaxllm.report.listing import as_dict, find_runs, lines, newest_first

    runs = newest_first(find_runs(folder))
    if as_json:
        print(json.dumps([as_dict(run, folder) for run in runs]))
    elif runs:
        print("\n".join(lines(runs, folder)))
    else:
        raise UserError(f"{folder}: no run is there, or below. A run is what jaxllm train --workdir wrote.")
    return 0
