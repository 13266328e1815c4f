"""How often to save: so that what saves cost and what failures cost is least (Young 1974)."""

import math

# Llama 3: 419 unexpected interruptions in 54 days on 16,384 GPUs (arXiv 2407.21783, 3.3.4), about one in 50,000 hours
# of a device.
DEVICE_HOURS_A_FAILURE = 50_000


def failure_seconds(num_devices: int) -> float:
    """The mean time between failures of so many devices."""
    return DEVICE_HOURS_A_FAILURE * 3600 / num_devices


def best_interval(save_seconds: float, num_devices: int) -> float:
    """Seconds from one save to the next: sqrt(2 x what a save costs x the time between failures)."""
    return math.sqrt(2 * save_seconds * failure_seconds(num_devices))


def advice(save_seconds: float, step_seconds: float, num_devices: int, every: int) -> str:
    """The line for a run whose saves stop its steps for `save_seconds` and that saves every so many steps."""
    best = best_interval(save_seconds, num_devices)
    steps = max(round(best / step_seconds), 1)
    return (
        f"a save stops the steps for {save_seconds:.2g} s; with a failure every {_hours(failure_seconds(num_devices))} "
        f"({num_devices:,} devices, {DEVICE_HOURS_A_FAILURE:,} device hours each: Llama 3) one every {_hours(best)} = "
        f"{steps:,} steps loses least (Young 1974); config.train.checkpoint_every={every:,} is one every "
        f"{_hours(every * step_seconds)}"
    )


def _hours(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.3g} h"
