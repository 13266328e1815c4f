"""The planner beside published runs: the table of README.

python -m tests.benchmarks.published_runs
"""

from jaxllm.plan.memory import memory
from jaxllm.plan.time import step_time
from tests.plan.published import published_runs


def main() -> None:
    errors, weighed = [], []
    print("| run | s a step: published | planned | error | GB a GPU: published | planned | error |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for run in published_runs():
        seconds, planned = run.seconds, step_time(run.job).total
        if seconds:
            errors.append((abs(planned / seconds - 1), run.name))
            time = f"{seconds:.3g} | {planned:.3g} | {planned / seconds - 1:+.1%}"
        else:
            time = "- | - | -"
        stored, counted = run.measured.get("memory_gb"), memory(run.job).total / 1e9
        if stored:
            weighed.append((abs(counted / stored - 1), run.name))
            space = f"{stored:.1f} ({run.measured['memory_kind']}) | {counted:.1f} | {counted / stored - 1:+.1%}"
        elif run.measured.get("out_of_memory"):
            space = f"out of memory | {counted:.1f} | -"
        else:
            space = "- | - | -"
        print(f"| {run.name}{' *' * run.is_fitted} | {time} | {space} |")
    within = sum(error <= 0.15 for error, _ in errors)
    print(f"\n{within} of {len(errors)} times within 15 %")
    for what, found in (("time", errors), ("memory", weighed)):
        print(f"\nlargest error of {what}: {max(found)[0]:.1%} ({max(found)[1]}), {len(found)} runs")


if __name__ == "__main__":
    main()
