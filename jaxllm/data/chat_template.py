"""Chat templates: how a conversation becomes the text that a model was trained on, in Jinja, as transformers does it.

A template comes with a tokenizer and is somebody else's program, so it runs in Jinja's sandbox. It writes all special
tokens itself, bos included: encode its text with `special=True` and put no bos in front. A few are built in, for
tokenizers that come without one.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from jaxllm.errors import UserError, did_you_mean

Message = Mapping[str, Any]  # {"role": "user", "content": "…"}, and whatever else a template knows
TEMPLATE_FILE = "chat_template.jinja"
# The built-in templates, and the special tokens that they write by name, beside the tokenizer's own bos and eos.
BUILT_IN = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "zephyr": (),
    "plain": (),
}
_BUILT_IN_FOLDER = Path(__file__).parent / "chat_templates"
_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
LARGEST_POWER, LARGEST_TEXT = 1 << 16, 1 << 24  # bits; characters, or items of a list
SPANS = "jaxllm_generation_spans"  # the variable by which {% generation %} blocks know where to note themselves


class Rendered(NamedTuple):
    """The text of a conversation."""

    text: str
    generation: list[tuple[int, int]]  # characters [start, end) in {% generation %} blocks: what the assistant wrote


class ChatTemplate:
    """A template and the names of the special tokens it may write (`bos_token`, `eos_token`, …)."""

    def __init__(self, source: str, variables: Mapping[str, str], name: str = "the chat template"):
        self.source, self.variables, self._name = source, dict(variables), name

    @property
    def marks_answers(self) -> bool:
        """Whether {% generation %} blocks say what the assistant writes."""
        return _GENERATION_BLOCK.search(self.source) is not None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, **variables: Any) -> Rendered:
        """The text of `messages`.

        Args:
          add_generation_prompt: whether the text ends with the beginning of an answer.
          variables: whatever else the template knows: tools, documents, enable_thinking, …

        Raises:
          UserError: the template is broken, or refuses the messages; with what it says.
        """
        # A key without a value is one the template is not to see: it would write "None".
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        spans: list[tuple[int, int]] = []
        blocks: list[str] = []
        given = {"tools": None, "documents": None, **self.variables, **variables, SPANS: _note(blocks, spans)}
        try:
            for block in self._template.generate(
                messages=messages, add_generation_prompt=add_generation_prompt, **given
            ):
                blocks.append(block)
        except Exception as error:  # a template is a program, and fails like one
            raise self._explain(error) from error
        text = "".join(blocks)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{self._name} writes half a surrogate pair at character {error.start}.") from error
        return Rendered(text, spans)

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateError as error:
            raise self._explain(error) from error

    def _explain(self, error: Exception) -> UserError:
        if isinstance(error, UserError):
            return error
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        return UserError(f"{self._name}{line}: {kind}{error}".rstrip())


def named_template(name: str) -> str | None:
    """The source of `config.data.chat_template`: one that is built in, or a file; None of "", the tokenizer's own.

    Raises:
      UserError: neither built in nor a file that can be read.
    """
    if not name:
        return None
    if name in BUILT_IN:
        return (_BUILT_IN_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    if not Path(name).is_file():
        hint = "no such file." if name.endswith(".jinja") else did_you_mean(name, [*BUILT_IN, "FILE.jinja"])
        raise UserError(f"config.data.chat_template={name!r}: {hint}")
    return find_template(Path(name).read_bytes(), {}, Path(name).parent)


def find_template(content: bytes | None, config: Mapping[str, Any], folder: Path) -> str | None:
    """The source of the template of a tokenizer in `folder`, if there is one.

    Args:
      content: of chat_template.jinja, which comes first.
      config: of tokenizer_config.json, where transformers 4 has the template: a text, or a list of
        {"name": …, "template": …}, of which the one named "default" is taken.

    Raises:
      UserError: a file that is not UTF-8.
    """
    if content is not None:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{folder / TEMPLATE_FILE}: not UTF-8 text (byte {error.start}).") from error
    given = config.get("chat_template")
    if isinstance(given, list):
        named = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
        given = named.get("default")
    return given if isinstance(given, str) else None


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's, which also refuses to make a number or a text that would fill the memory."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        size = (len(left) if hasattr(left, "__len__") else 1) * (len(right) if hasattr(right, "__len__") else 1)
        numbers = [abs(x) for x in (left, right) if isinstance(x, int)]
        whole = len(numbers) == 2
        if operator == "**" and whole and numbers[1] * numbers[0].bit_length() > LARGEST_POWER:
            raise jinja2.sandbox.SecurityError(f"{left} ** {right} is too large a number")
        if operator == "*" and not whole and size * max(numbers, default=0) > LARGEST_TEXT:
            raise jinja2.sandbox.SecurityError(f"a text or list repeated {max(numbers)} times is too long")
        return super().call_binop(context, operator, left, right)


def _environment() -> jinja2.Environment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes what HTML would misread."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _note(blocks: list[str], spans: list[tuple[int, int]]) -> Callable[[str], None]:
    """Notes the span of a text that comes after `blocks`."""

    def note(text: str) -> None:
        start = sum(map(len, blocks))
        spans.append((start, start + len(text)))

    return note


class Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}: writes its body, and notes which characters that were."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_write", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _write(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        text = caller()
        context[SPANS](text)
        return text
