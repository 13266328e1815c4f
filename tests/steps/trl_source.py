"""What TRL computes in the middle of long methods: those statements of its source, run on given numbers."""

import ast
from pathlib import Path
from typing import Any


def assigned(statement: ast.stmt) -> set[str]:
    """The names that a statement, or one within it, gives a value to, or to a part of."""
    targets = []
    for node in ast.walk(statement):
        targets += [*getattr(node, "targets", []), getattr(node, "target", None)]
    return {node.id for target in targets if target for node in ast.walk(target) if isinstance(node, ast.Name)}


class Source:
    """A module of TRL's as text: the whole may import what is no longer there."""

    def __init__(self, path: Path, **names: Any):
        """`names` are what its statements may use besides what `run` is told."""
        self._path, self._tree, self._names = path, ast.parse(path.read_text(encoding="utf-8")), names

    def define(self, *functions: str) -> None:
        """Makes functions of the module's known by their names, here and to its statements."""
        found = [node for node in self._tree.body if isinstance(node, ast.FunctionDef) and node.name in functions]
        assert len(found) == len(functions), functions
        self._execute(found, self._names)

    def __getattr__(self, name: str) -> Any:
        return self._names[name]

    def run(self, first: str, last: str, /, **values: Any) -> dict[str, Any]:
        """The names after the statements from the first that assigns `first` to the last that assigns `last`.

        They are those of the innermost block that assigns both.
        """
        blocks = [block for block in self._blocks() if {first, last} <= set().union(*map(assigned, block))]
        block = min(blocks, key=lambda block: block[-1].end_lineno - block[0].lineno)
        start = next(i for i, statement in enumerate(block) if first in assigned(statement))
        end = max(i for i, statement in enumerate(block) if last in assigned(statement))
        names = self._names | values
        self._execute(block[start : end + 1], names)
        return names

    def _blocks(self) -> list[list[ast.stmt]]:
        return [block for node in ast.walk(self._tree) if isinstance(block := getattr(node, "body", None), list)]

    def _execute(self, statements: list[ast.stmt], names: dict[str, Any]) -> None:
        exec(compile(ast.Module(statements, type_ignores=[]), str(self._path), "exec"), names)
