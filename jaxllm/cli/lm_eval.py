"""`jaxllm lm_eval`: lm-evaluation-harness with the model `jaxllm`. Every argument is the harness's own."""

import importlib.util
import sys

from jaxllm.errors import UserError


def main(argv: list[str]) -> int:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed: pip install 'jaxllm[eval]'.")
    from lm_eval.__main__ import cli_evaluate

    import jaxllm.interop.lm_eval  # noqa: F401  registers the model

    sys.argv = ["jaxllm lm_eval", *argv]  # where the harness looks for its arguments
    cli_evaluate()
    return 0
