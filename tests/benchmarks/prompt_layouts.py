"""Virtual tokens under layouts: the numbers of one device, for every kind of them on every model.

    python -m tests.benchmarks.prompt_layouts

Three steps with dropout on packed rows. Prints for each kind and layout the largest relative difference of losses and
gradient norms, and of trained parameters, from those of one device. `make test` has some of them
(tests/layout/test_prompts.py).
"""

import argparse
import os

FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama,gpt2,moe")
    options = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
    from tests.layout import test_prompts

    for model in options.models.split(","):
        for kind in test_prompts.KINDS:
            for layout in test_prompts.LAYOUTS:
                found = test_prompts.differences(model, kind, layout)
                print(f"{model}, {kind}, {layout}: {found[0]:.1e} of the numbers, {found[1]:.1e} of the parameters")


if __name__ == "__main__":
    main()
