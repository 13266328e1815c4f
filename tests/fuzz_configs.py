"""Configs mutated at random: each is a run that could start, or is refused in a few lines, never by a traceback.

    python -m tests.fuzz_configs --count 500 --seed 0 [--only 17] [--train_every 10] [--folder DIR]

Each case is a tiny run of one of the train steps with one to three fields of any group set to something else, in the
config file or by flag: another type, out of range, zero, huge, NaN, empty, misspelt, or a layout whose parts contradict
each other. It goes through what `jaxllm train` does, on 8 virtual devices, as far as the lowering of the step; every
`train_every`th of those that get there trains two steps.

Prints how many got there, what the others were told, and of each failure the command that shows it.
"""

import argparse
import contextlib
import json
import random
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from tests.fuzz_values import CHOICES, FOCUS, LAYOUT, PRESETS, REAL, STEPS, TEXTS, TRUTH, WEIGHTS, WHOLE, WRITTEN
from tests.fuzzing import Campaign, Outcome, outcome_of, write_lines
from tests.train import tiny_run

HEAD = """\
from jaxllm.train.config import base_config


def get_config():
    config = base_config()
"""


class Files(NamedTuple):
    """What the runs read."""

    folder: Path
    text: Path
    examples: Path
    pairs: Path
    prompts: Path
    rewards: Path
    base: Path  # a WORKDIR, of the tiny model


class Case(NamedTuple):
    """A run of `step` that is to be tried."""

    step: str
    lines: list[str]  # of its config file, after those of the step
    flags: list[str]


class _Lowered(BaseException):
    """The step is lowered: here the compiler would begin."""


def make_files(folder: Path) -> Files:
    """Writes what the runs read."""
    files = Files(folder, *(folder / name for name in ("a.txt", "a.jsonl", "b.jsonl", "c.jsonl", "r.py", "base")))
    tiny_run.write_text(files.text)
    talks = [[{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}!"}] for n in range(80)]
    write_lines(files.examples, (json.dumps({"messages": talk}) for talk in talks))
    pairs = [{"prompt": f"say {n}", "chosen": f"{n} and {n}", "rejected": f"not {n}"} for n in range(60)]
    write_lines(files.pairs, map(json.dumps, pairs))
    write_lines(files.prompts, (json.dumps({"prompt": f"say {n}", "answer": str(n)}) for n in range(60)))
    files.rewards.write_text("def is_long(completions):\n    return [float(len(text)) for text in completions]\n")
    make_base(files)
    return files


def make_base(files: Files) -> None:
    """A WORKDIR as a run leaves it, untrained."""
    import jax

    from jaxllm.data.tokenizer_training import train_tokenizer
    from jaxllm.layout.config import LayoutConfig, MeshConfig
    from jaxllm.layout.layout import make_layout
    from jaxllm.model.spec import model_spec
    from jaxllm.train.checkpoint.checkpoints import Checkpoints
    from jaxllm.train.config import config_dict
    from jaxllm.train.optimizer import make_optimizer
    from jaxllm.train.state import init_state

    tokenizer = train_tokenizer([files.examples.read_text(), files.pairs.read_text()], vocab_size=330)
    tokenizer.save(files.base / "tokenizer")
    config = tiny_run.tiny_config(files.text, files.folder / "cache", **{"model.max_length": 64, "model.dropout": 0.0})
    (files.base / "config.json").write_text(json.dumps(config_dict(config)))
    spec = model_spec(config.model.resolved(tokenizer.vocab_size))
    optimizer = make_optimizer(config.optimizer, config.train.steps, spec.axes)
    layout = make_layout(MeshConfig(data=1), LayoutConfig(), devices=jax.devices()[:1])
    with Checkpoints(files.base / "checkpoints") as checkpoints:
        checkpoints.save(init_state(spec, optimizer, layout, seed=0), {}, config_dict(config), {})


def config_lines(step: str, files: Files) -> list[str]:
    """The lines of a config file of this step that is valid."""
    fields = {group: dict(values) for group, values in tiny_run.FIELDS.items()}
    fields["train"] |= {"steps": 2, "eval_every": 0, "checkpoint_every": 0}
    fields["optimizer"] |= {"warmup_steps": 0}
    fields["data"] |= {"path": str(files.text), "cache": str(files.folder / "cache")}
    if step == "mlm":
        fields["model"] |= {"causal": False}
    if step not in ("pretrain", "mlm"):
        path = {"sft": files.examples, "lora": files.examples, "prompt": files.examples}.get(step, files.pairs)
        path = files.prompts if step in ("ppo", "grpo") else path
        fields["model"] |= {"max_length": 64, "dropout": 0.0}
        fields["data"] |= {"source": "jsonl", "path": str(path), "held_out": "0.1", "packing": "best_fit"}
        fields["data"] |= {"truncation": "drop", "chat_template": "plain", "tokenizer": str(files.base / "tokenizer")}
    if step in ("lora", "prompt"):
        fields["train"] |= {"init_from": str(files.base)}
        fields["adapter"] = {"kind": step, "rank": 2, "num_virtual_tokens": 2}
    if step == "reward":
        fields["model"] |= {"scalar_head": True}
    if step in ("ppo", "grpo"):
        fields["rollout"] = {"rewards": f"{files.rewards}:is_long", "prompts": 4, "samples": 4, "max_new_tokens": 8}
    lines = [f"config.{group}.update({values!r})" for group, values in fields.items()]
    return [f"config.train_step = {step!r}", *lines]


def all_fields() -> dict[str, Any]:
    """ "group.field" -> its default, of every field there is."""
    from jaxllm.train.config import base_config

    def within(group: Any, name: str) -> Iterator[tuple[str, Any]]:
        for field, value in group.items():
            if hasattr(value, "items"):
                yield from within(value, f"{name}{field}.")
            else:
                yield name + field, value

    return dict(within(base_config(), ""))


def draw_case(draw: random.Random, files: Files, fields: dict[str, Any]) -> Case:
    """One to three fields, or a layout, of a run that would be valid without."""
    step = draw.choices(STEPS, WEIGHTS)[0]
    how = draw.choices(("fields", "focus", "layout", "misspelt", "written", "preset"), (30, 25, 25, 7, 9, 4))[0]
    lines: list[str] = []
    flags: list[str] = []
    if how in ("fields", "layout"):
        some = LAYOUT if how == "layout" else fields_of(draw, step, fields)
        names = draw.sample(sorted(some), draw.randint(2, 6) if how == "layout" else draw.randint(1, 3))
        for name in names:
            value = str(draw.choice(LAYOUT[name])) if how == "layout" else draw_value(draw, name, fields[name], files)
            flags.append(written(draw, name, value))
    elif how == "focus":
        chosen, fixed, names = draw.choice(FOCUS)
        step = chosen or step
        some = fixed | {n: draw_value(draw, n, fields[n], files) for n in draw.sample(names, draw.randint(1, 3))}
        flags = [written(draw, name, value) for name, value in some.items()]
    elif how == "misspelt":
        flags.append(f"--config.{misspelt(draw, draw.choice(sorted(fields)))}={draw.choice(WHOLE + TEXTS)}")
    elif how == "written":
        names = draw.sample(sorted(fields), draw.randint(1, 2))
        lines = [f"config.{name} = {draw.choice(WRITTEN)}" for name in names]
    else:
        group = draw.choice(("model", "model", "adapter", "data", "mesh", "train"))
        flags = [f"--config.{group}={draw.choice(PRESETS).format(base=files.base)}"]
    return Case(step, lines, flags)


def fields_of(draw: random.Random, step: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Those that a step looks at; now and then all."""
    groups = {"model", "mesh", "layout", "precision", "data", "optimizer", "train", "seed", "train_step", step}
    groups |= {"adapter"} if step in ("lora", "prompt") else set()
    groups |= {"rollout"} if step in ("ppo", "grpo") else set()
    looked_at = {name: value for name, value in fields.items() if name.partition(".")[0] in groups}
    return looked_at if draw.random() < 0.85 else fields


def draw_value(draw: random.Random, name: str, default: Any, files: Files) -> str:
    """The text of a value for a field: now of its own kind, now of any."""
    kinds = {bool: TRUTH, int: WHOLE, float: REAL, str: TEXTS}
    values = kinds[type(default)]
    if name in CHOICES and draw.random() < 0.6:
        values = CHOICES[name]
    elif draw.random() < 0.1:
        values = draw.choice(list(kinds.values()))
    elif isinstance(default, str) and draw.random() < 0.3:
        values = tuple(map(str, files[:7]))
    return draw.choice(values)


def written(draw: random.Random, name: str, value: str) -> str:
    """As one of the ways to write a flag."""
    if value in ("false", "False") and draw.random() < 0.5:
        return f"--noconfig.{name}"
    if value in ("true", "True") and draw.random() < 0.5:
        return f"--config.{name}"
    return f"--config.{name}={value}"


def misspelt(draw: random.Random, name: str) -> str:
    """A name that is no field, or hardly."""
    group, _, field = name.rpartition(".")
    at = draw.randrange(len(name))
    ways = (
        name[:at] + name[at + 1 :],
        name[:at] + draw.choice("abcdefgh_.-0 ") + name[at:],
        name.upper(),
        f"{name}.{field}",
        f".{name}",
        f"{name}.",
        group,
        field,
        "",
        f"{draw.choice(('model', 'mesh', 'rollout', 'x', ''))}.{field}",
        f"{group}.__class__",
        f"{group}.update",
        f"{group}.items.{field}",
    )
    return draw.choice(ways)


def try_case(case: Case, files: Files, *, trains: bool = False) -> Outcome:
    """What becomes of a case, as far as the lowering of its step, or with `trains` to its end."""
    from jaxllm.cli import train

    argv = arguments(case, files)

    def lowers() -> None:
        with mock.patch("jaxllm.train.prepare.compile_checked", side_effect=_Lowered), contextlib.suppress(_Lowered):
            raise AssertionError(f"it ended with {train.main(argv)} before its step was lowered")

    def runs() -> None:
        code = train.main(argv)
        assert code in (0, 1), f"exit code {code}"

    here = files.folder / "where" / "it" / "runs"  # paths that are drawn may be relative
    here.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(here):
        outcome = outcome_of(runs if trains else lowers, files.folder)
    shutil.rmtree(files.folder / "run", ignore_errors=True)
    if trains and outcome.kind == "refused":
        return Outcome("failed", f"refused after compiling: {outcome.said}")
    return outcome


def arguments(case: Case, files: Files) -> list[str]:
    """Writes the config file of a case; the arguments of `jaxllm train`."""
    lines = [*config_lines(case.step, files), *case.lines]
    file = files.folder / "config.py"
    text = HEAD + "".join(f"    {line}\n" for line in lines) + "    return config\n"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    return [f"--config={file}", f"--workdir={files.folder / 'run'}", *case.flags]


def command(case: Case, files: Files) -> str:
    """What shows a case again, with the lines to add to the config of its step."""
    added = "".join(f" [in the file: {line}]" for line in case.lines)
    return f"train_step={case.step}{added}: jaxllm train {shlex.join(arguments(case, files))}"


def cases(seed: int, count: int, files: Files) -> list[Case]:
    """The cases of a campaign; a longer one begins with those of a shorter."""
    fields = all_fields()
    return [draw_case(random.Random(f"{seed} {number}"), files, fields) for number in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="the numbers of the cases to try")
    parser.add_argument("--train_every", type=int, default=10, help="of the valid cases; 0: none")
    parser.add_argument("--folder", type=Path, help="where the files of the runs lie; default a temporary one")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        return campaign(make_files(folder), options)


def campaign(files: Files, options: argparse.Namespace) -> int:
    import jax

    counted = Campaign()
    for number, case in enumerate(cases(options.seed, options.count, files)):
        if options.only is not None and number not in options.only:
            continue
        outcome = counted.timed(f"case {number}", lambda case=case: try_case(case, files))
        if outcome.kind == "valid" and options.train_every and counted.kinds["valid"] % options.train_every == 0:
            outcome = try_case(case, files, trains=True)
            counted.kinds["trained"] += outcome.kind == "valid"
        again = f"python -m tests.fuzz_configs --seed {options.seed} --count {number + 1} --only {number}"
        counted.add(outcome, f"{again}\n{command(case, files)}", verbose=options.only is not None)
        if number % 50 == 49:
            jax.clear_caches()
    return counted.finish()


if __name__ == "__main__":
    import tests.conftest  # eight virtual devices  # noqa: F401

    sys.exit(main())
