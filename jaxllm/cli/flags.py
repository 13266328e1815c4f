"""Flags of a verb. `argparse`, but every mistake is a UserError, and a misspelt flag is told the nearest one."""

import argparse
from typing import NoReturn

from jaxllm.errors import UserError, did_you_mean


class Parser(argparse.ArgumentParser):
    """The parser of one verb: `Parser("generate", "continue prompts", examples="…")`, then `add_argument` as usual.

    `values` names those that follow no flag, for the usage line.
    """

    def __init__(self, verb: str, what: str, examples: str = "", values: str = "") -> None:
        super().__init__(
            prog=f"jaxllm {verb}",
            usage=" ".join(filter(None, ("jaxllm", verb, values, "[--flag=value …]"))),
            description=what,
            epilog=examples and f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def add_config(self) -> None:
        """The flag that names an experiment. `config_file.refuse_unnamed` answers where it was left out."""
        self.add_argument("--config", metavar="FILE.py", help="the experiment: a Python file with get_config()")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See {self.prog} --help.")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Parses `argv`; a flag nobody knows is answered with the nearest one, before a missing one is missed."""
        known = {name for action in self._actions for name in action.option_strings}
        for argument in argv:
            if argument.startswith("--") and argument.partition("=")[0] not in known:
                raise UserError(self._unknown(argument))
        options, unknown = self.parse_known_args(argv)
        if unknown:
            raise UserError(self._unknown(unknown[0]))
        return options

    def parse_with_overrides(self, argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
        """Parses `argv`, and takes out the `--config.group.field=value` overrides as {"group.field": "value"}."""
        rest, overrides = split_overrides(argv)
        return self.parse(rest), overrides

    def _unknown(self, argument: str) -> str:
        flag = argument.partition("=")[0]
        flags = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        if not argument.startswith("-"):
            placed = [action.metavar for action in self._actions if not action.option_strings]
            rule = f"after {', '.join(placed)} every" if placed else "every"
            return f"'{argument}' is not expected here: {rule} value follows its flag. See {self.prog} --help."
        if "." in flag and "--config" in flags:
            return f"{flag} is not a flag. Fields of the config are written --config.GROUP.FIELD=VALUE."
        return f"{flag} is not a flag of {self.prog}. {did_you_mean(flag, flags)}"


def split_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Separates `--config.a.b=v`, `--config.a.b v`, `--config.a.b` and `--noconfig.a.b` from the other arguments."""
    rest: list[str] = []
    overrides: dict[str, str] = {}
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        # `--config.model=llama3_8b` lays a preset; it has one dot, and is an override all the same.
        if argument.startswith("--noconfig."):
            overrides[name.removeprefix("noconfig.")] = "false"
        elif argument.startswith("--config."):
            if not equals:
                value = arguments.pop(0) if arguments and not arguments[0].startswith("--") else "true"
            overrides[name.removeprefix("config.")] = value
        else:
            rest.append(argument)
    return rest, overrides
