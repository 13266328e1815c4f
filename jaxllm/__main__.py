"""`python -m jaxllm VERB …`, where the console script is not on the path."""

import sys

from jaxllm.cli.main import main

sys.exit(main())
