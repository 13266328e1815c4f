"""`jaxllm chat`: a conversation in the terminal."""

import sys

from jaxllm.cli import workdir
from jaxllm.cli.flags import Parser
from jaxllm.cli.generate import add_sampling_flags
from jaxllm.errors import UserError

EXAMPLES = """\
  jaxllm chat --workdir runs/chat
  jaxllm chat --workdir runs/chat --system "Answer in one sentence." --temperature 0.3

/reset forgets what was said, /quit (or the end of input) leaves. With input from a pipe each line is a turn."""


def main(argv: list[str]) -> int:
    what = "Talks with a model: your lines and its answers are one growing text, by its chat template if it has one."
    parser = Parser("chat", what, EXAMPLES)
    workdir.add_flags(parser)
    add_sampling_flags(parser, temperature=0.8)
    parser.add_argument("--system", default="", metavar="TEXT", help="what stands before the conversation")
    parser.add_argument("--user", default="User", metavar="NAME", help="how your turns are marked (%(default)s)")
    parser.add_argument("--assistant", default="Assistant", metavar="NAME", help="and the model's (%(default)s)")
    options, overrides = parser.parse_with_overrides(argv)

    from jaxllm.generate.chat import Chat, PlainRoles, TemplateRoles
    from jaxllm.generate.sampling import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    sampling = Sampling(**{name: getattr(options, name) for name in names})
    run = workdir.open_workdir(options, overrides)
    import jax

    from jaxllm.generate.engine import Engine

    if jax.process_count() > 1:
        raise UserError("chat runs in one process: start it on one machine.")
    marks, template = (options.user, options.assistant, options.system), run.tokenizer.chat_template
    roles = PlainRoles(*marks) if template is None else TemplateRoles(template, *marks)
    chat = Chat(Engine(run), roles, sampling, options.max_new_tokens, stop=options.stop, seed=options.seed)
    return _loop(chat)


def _loop(chat) -> int:
    asks = sys.stdin.isatty()
    if asks:
        print("/reset forgets what was said, /quit leaves.", file=sys.stderr)
    while True:
        try:
            line = input(f"{chat.roles.user}: " if asks else "").strip()
        except EOFError:
            if asks:
                print()
            return 0
        if line == "/quit":
            return 0
        if line == "/reset":
            chat.reset()
        elif line:
            if asks:
                print(f"{chat.roles.assistant}: ", end="", flush=True)
            forgotten = chat.forgotten
            try:
                chat.say(line, on_text=lambda text: print(text, end="", flush=True))
            except UserError as error:  # this turn was too long; the conversation goes on
                print(f"jaxllm: {error}", file=sys.stderr)
                continue
            print(flush=True)
            if chat.forgotten > forgotten:
                print(f"(context full: the first {chat.forgotten} turns are forgotten)", file=sys.stderr)
