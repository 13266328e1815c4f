"""`jaxllm VERB …`: finds the verb's file, runs its `main(argv)` and turns a user's mistake into a line and exit code 2.

Nothing here imports JAX: `jaxllm --help` answers at once.
"""

import importlib
import importlib.metadata
import os
import sys
import traceback
from typing import NoReturn

from jaxllm.errors import CRASHED, LOST, MISTAKE, Lost, UserError, did_you_mean
from jaxllm.layout.virtual_devices import add_threads

VERBS = {
    "tokenizer": "train a tokenizer on text",
    "train": "train a model; goes on where WORKDIR's last checkpoint left off",
    "runs": "a table of the runs below a folder: state, step, loss",
    "report": "a page of a run, or of several over each other",
    "generate": "continue prompts",
    "chat": "talk with a model in the terminal",
    "evaluate": "loss and bits per character on files, accuracy on multiple choice",
    "lm_eval": "lm-evaluation-harness, with --model jaxllm --model_args workdir=DIR",
    "convert": "a model from or to a Hugging Face directory",
    "instructions": "sets of examples for fine-tuning: cleaned, written by a model, looked into",
    "layouts": "every layout of a model on N devices: legal, measured",
    "plan": "whether a run fits a cluster, what it sends and how long it takes, without a GPU",
    "fabric": "GB/s of each mesh axis at hand, beside the cluster's table",
    "explain": "where each tensor lies under a layout, and what each collective is for",
}

HELP = """\
jaxllm: train large language models in JAX, on any layout of devices.

usage: jaxllm VERB [--flag=value …]        jaxllm VERB --help says more

{verbs}

From a text to a model that writes:
  jaxllm train --config configs/shakespeare.py --workdir runs/shakespeare
  jaxllm generate --workdir runs/shakespeare --prompt "To be, or"

The same on 8 devices, weights and optimizer state spread over four, matrices over two:
  jaxllm train --config configs/shakespeare.py --workdir runs/tp --config.mesh.data=4 --config.mesh.model=2
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one verb. Returns the exit code, one of jaxllm/errors.py."""
    argv = sys.argv[1:] if argv is None else argv
    add_threads()
    try:
        code = _dispatch(argv)
        sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's last breath
        return code
    except UserError as error:
        return _ended(str(error), MISTAKE)
    except Lost as error:
        return _ended(str(error), LOST)
    except KeyboardInterrupt:
        print("jaxllm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `jaxllm generate … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        traceback.print_exc()
        return _ended(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", CRASHED)


def _ended(message: str, code: int) -> int:
    """Says why, with the process's number where there are several; then this one does not wait for the others."""
    process = _process()
    print(f"jaxllm: {message}" if process is None else f"jaxllm: process {process}: {message}", file=sys.stderr)
    if process is not None:
        _leave(code)
    return code


def _process() -> int | None:
    """The number of this process, where it has joined others."""
    if "jax" not in sys.modules:
        return None
    import jax

    return jax.process_index() if jax.distributed.is_initialized() else None


def _leave(code: int) -> NoReturn:
    """Ends at once: on its way out Python would wait a minute for all other processes to end too."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP.format(verbs="\n".join(f"  {verb:<12} {what}" for verb, what in VERBS.items())), end="")
        return 0
    if argv[0] == "--version":
        print(f"jaxllm {importlib.metadata.version('jaxllm')}")
        return 0
    verb, *rest = argv
    if verb.startswith("-"):
        raise UserError(f"the verb comes first: jaxllm VERB {verb} … Verbs: {', '.join(VERBS)}.")
    if verb not in VERBS:
        raise UserError(f"'{verb}' is not a verb. {did_you_mean(verb, VERBS)}")
    return importlib.import_module(f"jaxllm.cli.{verb}").main(rest)
