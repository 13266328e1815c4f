"""`jaxllm instructions`: sets of instructions, built out of files or by a model, and looked into."""

import importlib

from jaxllm.errors import UserError

# Each has flags of its own, and a module that is imported when it is asked for.
WAYS = {
    "--input": ("build", "builds a clean set out of files: duplicates, filters, held-out part, mixture by weight"),
    "--expand": ("expand", "lets a model write new instructions from seed tasks (Self-Instruct)"),
    "--inspect": ("inspect", "shows examples, and what of them is learned"),
}

HELP = """\
jaxllm instructions: data for supervised fine-tuning.

usage: jaxllm instructions --input=FILES … | --expand=FILE … | --inspect=FILES …        with --help says more

{ways}
"""


def main(argv: list[str]) -> int:
    """Runs the verb; `argv` is what follows it. Returns the exit code.

    Raises:
      UserError: not one of the ways is asked for, or what that way refuses.
    """
    asked = [way for way in WAYS if any(argument.partition("=")[0] == way for argument in argv)]
    helps = any(argument in ("-h", "--help") for argument in argv)
    if len(asked) == 1:
        module = importlib.import_module(f"jaxllm.cli.instructions.{WAYS[asked[0]][0]}")
        return module.main(["--help"] if helps else argv)
    if helps:
        print(HELP.format(ways="\n".join(f"  {way:<10} {what}" for way, (_, what) in WAYS.items())), end="")
        return 0
    raise UserError(
        "say what to do: --input FILES --out DIR, --expand FILE, or --inspect FILES. See jaxllm instructions --help."
        if not asked
        else f"{' and '.join(asked)} are different things to do: ask for one of them."
    )
