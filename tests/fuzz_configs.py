"""Configs mutated at random: each is a run that could start, or is refused in a few lines, never by a traceback.

    python -m tests.fuzz_configs --count 500 --seed 0 [--only 17] [--train_every 10] [--folder DIR]

Each case is a tiny run of one of the train steps with one to three fields of any group set to something else, in the
config file or by flag: another type, out of range, zero, huge, NaN, empty, misspelt, or a layout whose parts contradict
each other. It goes through what `jaxllm train` does, on 8 virtual devices, as far as the lowering of the step; every
`train_every`th of those that get there trains two steps.

Prints how many got there, what the others were told, and of each failure the command that shows it.
"""

import argparse
import collections
import contextlib
import io
import json
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from tests.train import tiny_run

SECONDS = 120  # that a case may take; a healthy one takes a few
BYTES = 6 << 30  # that a case may allocate; a healthy one takes a few hundred megabytes
LONGEST_MESSAGE = 1500  # characters, in at most LINES
LINES = 8

HEAD = """\
from jaxllm.train.config import base_config


def get_config():
    config = base_config()
"""
STEPS = ("pretrain", "mlm", "sft", "lora", "prompt", "reward", "dpo", "ppo", "grpo")
WEIGHTS = (6, 2, 3, 3, 2, 1, 2, 1, 1)


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


class Outcome(NamedTuple):
    """What became of a case."""

    kind: str  # valid | refused | failed
    said: str = ""


class _Lowered(BaseException):
    """The step is lowered: here the compiler would begin."""


class _TookTooLong(BaseException):
    pass


def make_files(folder: Path) -> Files:
    """Writes what the runs read."""
    files = Files(folder, *(folder / name for name in ("a.txt", "a.jsonl", "b.jsonl", "c.jsonl", "r.py", "base")))
    tiny_run.write_text(files.text)
    talks = [[{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}!"}] for n in range(80)]
    write_lines(files.examples, ({"messages": talk} for talk in talks))
    pairs = [{"prompt": f"say {n}", "chosen": f"{n} and {n}", "rejected": f"not {n}"} for n in range(60)]
    write_lines(files.pairs, pairs)
    write_lines(files.prompts, ({"prompt": f"say {n}", "answer": str(n)} for n in range(60)))
    files.rewards.write_text("def is_long(completions):\n    return [float(len(text)) for text in completions]\n")
    make_base(files)
    return files


def write_lines(path: Path, records: Any) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def make_base(files: Files) -> None:
    """A WORKDIR as a run leaves it, untrained."""
    import jax

    from jaxllm.data.tokenizer_training import train_tokenizer
    from jaxllm.layout.config import LayoutConfig, MeshConfig
    from jaxllm.layout.layout import make_layout
    from jaxllm.model.spec import model_spec
    from jaxllm.train.checkpoint import Checkpoints
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


# What fields are set to. Words that are good for some text field are in TEXTS, so that valid runs are drawn too.
WHOLE = ("-1", "0", "1", "2", "3", "4", "5", "7", "8", "16", "32", "64", "1000", "65536", "-2", "-9999999999", "1e3")
WHOLE += ("2147483647", "2147483648", "9999999999999", "9" * 30, "2.5", "", "none", "nan", "true", " 4", "1_000", "0x10")
REAL = ("nan", "inf", "-inf", "-1", "0", "1", "0.5", "1e-300", "1e-30", "1e300", "1e400", "-0.0", "", "many", "0,1")
REAL += ("2", "100", "1e-3", "True", "1e9")
TRUTH = ("true", "false", "1", "0", "yes", "no", "maybe", "", "2", "None", "TRUE")
TEXTS = ("", " ", "none", "None", "auto", "nosuch", "no/such/file", "/", ".", "a=b", "=", ",", "[", "(", "\x00", "x.py:y")
TEXTS += (".py:", "{0}", "%s", "x" * 300, "\u5374\u8bf4", "\ud800", "../..", "-1", "0.5", "1e400", "hf:gpt2", "nan")
CHOICES = {
    "model.positions": ("learned", "rope", "alibi", "none"),
    "model.rope_scaling": ("none", "linear", "dynamic", "yarn", "llama3"),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.norm_position": ("pre", "post"),
    "model.activation": ("gelu", "gelu_tanh", "silu", "relu"),
    "model.expert_dispatch": ("dropless", "capacity"),
    "adapter.kind": ("none", "lora", "prompt", "p_tuning", "prefix"),
    "adapter.base_weights": ("compute", "nf4"),
    "adapter.targets": ("all-linear", "query,mlp.up", "attention", ".*", "query,,", "(", "head"),
    "adapter.init": ("kaiming", "gaussian", "pissa"),
    "adapter.prompt_init": ("random", "vocabulary", "text"),
    "adapter.prompt_text": ("say", ""),
    "adapter.encoder": ("mlp", "lstm"),
    "layout.rules": ("megatron", "fsdp", "megatron_sp", "2d"),
    "layout.rule_overrides": ("mlp=none", "vocab=none", "embed=data", "mlp=data", "batch=data", "heads=none,mlp=none"),
    "layout.schedule": ("gpipe", "1f1b", "1f1b_aligned", "interleaved", "zero_bubble"),
    "layout.stage_layers": ("", "light_ends", "1,1", "2,0", "1,1,1", "-1,3", "1,,1", "99999999999,1"),
    "layout.context_attention": ("ring", "all_gather"),
    "layout.remat": ("none", "selective", "full"),
    "layout.attention": ("auto", "xla", "cudnn"),
    "precision.compute": ("bfloat16", "float32", "float16"),
    "precision.params": ("float32", "bfloat16"),
    "precision.gradients": ("float32", "bfloat16"),
    "data.source": ("text", "jsonl", "json", "parquet", "csv", "arrayrecord", "mixture", "tfds:", "tfds:nosuch"),
    "data.tokenizer": ("bpe:280", "unigram:300", "bpe:0", "bpe:-5", "bpe:1", "bpe:x", "bpe:", "bpe:999999999", "bpe:270"),
    "data.held_out": ("", "0.1", "0", "1", "-0.1", "nan", "inf", "1e-9", "file:", "file:nosuch", "the cat", "0.999"),
    "data.fields": ("", "prompt=a", "prompt=prompt", "nosuch=a", "=,=", "messages=messages"),
    "data.packing": ("concat", "best_fit", "none"),
    "data.chat_template": ("", "plain", "zephyr", "chatml", "llama3"),
    "data.supervise": ("completions", "all"),
    "data.truncation": ("refuse", "cut", "drop"),
    "optimizer.name": ("adamw", "lion", "muon", "sgd"),
    "optimizer.schedule": ("cosine", "linear", "wsd", "constant"),
    "optimizer.decay_mask": ("matrices", "all", "kernel", "(", "nosuch", "[a-", "(?P<x"),
    "dpo.loss": ("sigmoid", "conservative", "robust", "hinge", "ipo_mean", "ipo_sum", "orpo", "simpo"),
    "dpo.reference": ("alongside", "precomputed"),
    "ppo.kl_estimator": ("k1", "k3"),
    "grpo.aggregation": ("token_mean", "sequence_mean", "max_length"),
    "grpo.advantage_scale": ("group", "batch", "none"),
    "train_step": STEPS,
    "cluster.name": ("h100x8", "nosuch", "a.toml"),
}
# A layout and the sizes that go with it: what is drawn of these contradicts itself now and then.
LAYOUT = {
    "mesh.pipeline": (1, 1, 2, 2, 4),
    "mesh.replica": (1, 1, 1, 2),
    "mesh.data": (-1, -1, -1, 1, 2, 4),
    "mesh.expert": (1, 1, 1, 2),
    "mesh.context": (1, 1, 1, 2),
    "mesh.model": (1, 1, 2, 2, 4),
    "layout.zero_stage": (0, 1, 2, 3, 3),
    "layout.num_microbatches": (1, 2, 4, 3),
    "layout.schedule": CHOICES["layout.schedule"],
    "layout.virtual_stages": (1, 1, 1, 2),
    "layout.stage_layers": ("", "", "", "light_ends", "1,1"),
    "layout.remat": CHOICES["layout.remat"],
    "layout.scan_layers": (True, False),
    "layout.sequence_parallel": (True, False),
    "layout.context_attention": CHOICES["layout.context_attention"],
    "layout.rule_overrides": ("", "", *CHOICES["layout.rule_overrides"]),
    "layout.rules": ("megatron", "megatron", "fsdp", "megatron_sp", "2d"),
    "layout.attention": ("auto", "xla", "cudnn"),
    "model.num_layers": (2, 2, 4, 3),
    "model.num_heads": (2, 4, 8, 3),
    "model.num_kv_heads": (0, 1, 2, 4),
    "model.embed_dim": (16, 32, 24),
    "model.num_experts": (0, 0, 2, 4),
    "model.experts_per_token": (1, 2),
    "model.expert_dispatch": CHOICES["model.expert_dispatch"],
    "model.sliding_window": (0, 0, 4),
    "data.batch_size": (8, 8, 16, 32),
    "data.length": (0, 0, 16, 12),
    "precision.compute": CHOICES["precision.compute"],
    "precision.gradients": CHOICES["precision.gradients"],
    "optimizer.name": CHOICES["optimizer.name"][:3],
    "rollout.mesh.model": (0, 1, 2, 3),
}
PRESETS = ("gpt2", "llama3_8b", "gtp2", "", "/", "no/such", "{base}", "hf:gpt2", "\x00")
# Values of types that only a config file can write.
WRITTEN = ("None", "[]", "{}", "()", "[1, 2]", "{'a': 1}", "object", "b'x'", "1j", "'text'", "3", "2.5", "True", "-1")
WRITTEN += ("float('nan')", "10**40", "float('inf')", "range(3)", "lambda: 1", "'\\ud800'", "''", "__import__('math')")


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
    how = draw.choices(("fields", "layout", "misspelt", "written", "preset"), (45, 30, 8, 12, 5))[0]
    lines: list[str] = []
    flags: list[str] = []
    if how in ("fields", "layout"):
        some = LAYOUT if how == "layout" else fields
        names = draw.sample(sorted(some), draw.randint(2, 6) if how == "layout" else draw.randint(1, 3))
        for name in names:
            value = str(draw.choice(LAYOUT[name])) if how == "layout" else draw_value(draw, name, fields[name], files)
            flags.append(written(draw, name, value))
    elif how == "misspelt":
        flags.append(f"--config.{misspelt(draw, draw.choice(sorted(fields)))}={draw.choice(WHOLE + TEXTS)}")
    elif how == "written":
        names = draw.sample(sorted(fields), draw.randint(1, 2))
        lines = [f"config.{name} = {draw.choice(WRITTEN)}" for name in names]
    else:
        group = draw.choice(("model", "model", "adapter", "data", "mesh", "train"))
        flags = [f"--config.{group}={draw.choice(PRESETS).format(base=files.base)}"]
    return Case(step, lines, flags)


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
    from jaxllm.errors import UserError

    argv = arguments(case, files)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), within_bounds():
            if trains:
                code = train.main(argv)
                return Outcome("valid") if code in (0, 1) else Outcome("failed", f"exit code {code}")
            with mock.patch("jaxllm.train.loop.compile_checked", side_effect=_Lowered):
                train.main(argv)
        return Outcome("failed", "it ended before its step was lowered")
    except _Lowered:
        return Outcome("valid")
    except UserError as error:
        if (fault := fault_of(str(error))) or trains:
            return Outcome("failed", f"{fault or 'refused after compiling'}: {error}")
        return Outcome("refused", str(error))
    except _TookTooLong:
        return Outcome("failed", f"took more than {SECONDS} s: " + where_it_was(sys.exc_info()[1]))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Outcome("failed", "".join(traceback.format_exception(error)[-8:]))
    finally:
        shutil.rmtree(files.folder / "run", ignore_errors=True)


def where_it_was(error: BaseException) -> str:
    return " < ".join(f"{f.name} {Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-8:])


def fault_of(message: str) -> str:
    """What is wrong with a message to the user; "" where nothing is."""
    if len(message.splitlines()) > LINES or len(message) > LONGEST_MESSAGE:
        return "a long message"
    if "Traceback" in message or re.search(r'File ".*", line \d', message):
        return "a traceback in the message"
    if not re.search(r"config\.|config:|--\w", message):
        return "no field and no flag in the message"
    return ""


def arguments(case: Case, files: Files) -> list[str]:
    """Writes the config file of a case; the arguments of `jaxllm train`."""
    lines = [*config_lines(case.step, files), *case.lines]
    file = files.folder / "config.py"
    text = HEAD + "".join(f"    {line}\n" for line in lines) + "    return config\n"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    return [f"--config={file}", f"--workdir={files.folder / 'run'}", *case.flags]


@contextlib.contextmanager
def within_bounds() -> Iterator[None]:
    """Ends what takes too long, and what allocates too much, by an exception."""

    def too_long(*_: Any) -> None:
        raise _TookTooLong

    before = signal.signal(signal.SIGALRM, too_long)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + BYTES, limits[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def data_bytes() -> int:
    """What of this process's memory counts against RLIMIT_DATA."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))


def command(case: Case, files: Files) -> str:
    """What shows a case again, with the lines to add to the config of its step."""
    added = "".join(f" [in the file: {line}]" for line in case.lines)
    return f"train_step={case.step}{added}: jaxllm train {shlex.join(arguments(case, files))}"


def cases(seed: int, count: int, files: Files) -> list[Case]:
    """The cases of a campaign; a longer one begins with those of a shorter."""
    fields = all_fields()
    return [draw_case(random.Random(f"{seed} {number}"), files, fields) for number in range(count)]


def summary(message: str) -> str:
    """A message without its values, to count by."""
    return re.sub(r"'[^']*'|[-\d.]*\d|/\S+", "…", " ".join(message.split()))[:110]


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

    told, kinds, valid, slowest = collections.Counter(), collections.Counter(), 0, (0.0, -1)
    started = time.perf_counter()
    for number, case in enumerate(cases(options.seed, options.count, files)):
        if options.only is not None and number not in options.only:
            continue
        begun = time.perf_counter()
        print(f"\r{number}", end="", file=sys.stderr, flush=True)
        outcome = try_case(case, files)
        slowest = max(slowest, (time.perf_counter() - begun, number))
        valid += outcome.kind == "valid"
        if outcome.kind == "valid" and options.train_every and valid % options.train_every == 0:
            outcome = try_case(case, files, trains=True)
            kinds["trained"] += outcome.kind == "valid"
        kinds[outcome.kind] += 1
        if outcome.kind == "refused":
            told[summary(outcome.said)] += 1
        if outcome.kind == "failed":
            print(f"\n--- case {number}: {command(case, files)}\n{outcome.said}", flush=True)
        if options.only is not None:
            print(f"\n{outcome.kind} in {time.perf_counter() - begun:.1f} s: {command(case, files)}\n{outcome.said}")
        if number % 50 == 49:
            jax.clear_caches()
    print(f"\n{'times':>5}  what was said")
    for message, times in told.most_common():
        print(f"{times:>5}  {message}")
    print(
        f"{sum(kinds[kind] for kind in ('valid', 'refused', 'failed'))} cases of seed {options.seed} in "
        f"{time.perf_counter() - started:.0f} s: {kinds['valid']} valid (of them {kinds['trained']} trained two steps), "
        f"{kinds['refused']} refused in {len(told)} ways, {kinds['failed']} failed. "
        f"Slowest: case {slowest[1]}, {slowest[0]:.1f} s."
    )
    return 1 if kinds["failed"] else 0


if __name__ == "__main__":
    import tests.conftest  # eight virtual devices  # noqa: F401

    sys.exit(main())
