"""Runs as one HTML page: curves over each other, throughput, memory, the hours, samples, and how the configs differ."""

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.markup import COLOURS, document, key, section, table
from jaxllm.report import curves
from jaxllm.report.curves import Curve, Mark
from jaxllm.report.run import BEGINNINGS, Event, Run, is_number, moments
from jaxllm.train.config import base_config
from jaxllm.written import clock, gigabytes, number

FIRST = ("loss", "eval_bits_per_char", "grad_norm", "learning_rate")  # figures, then all others by name
THROUGHPUT = ("tokens_per_second", "mfu", "seconds_per_step", "data_wait", "host_seconds")
NO_CURVES = ("step", "time", "slowest_process")
LOGARITHMIC = ("loss", "grad_norm", "loss_scale")  # where the values are far apart
SHOWN_SAMPLES = 12  # open; older ones are folded
SHOWN_MARKS = 200  # of a figure
APART = [COLOURS[i] for i in (0, 3, 7, 4, 5, 1, 6, 8, 2, 9)]  # neighbours that differ
STYLE = (
    curves.STYLE
    + """
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; font-size: 13px; margin: 8px 0 2px; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 12px 20px; }
.events { max-height: 26rem; overflow: auto; } pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.sample { border-left: 3px solid var(--line); padding: 2px 10px; margin: 8px 0; } .sample b { font-weight: 600; }
summary { cursor: pointer; margin: 6px 0; }
"""
)


def page(runs: Sequence[Run]) -> str:
    """The text of the page, of one run or of several."""
    sections = [
        ("Curves", _figures(runs, _curve_names(runs))),
        ("Throughput", _figures(runs, [name for name in THROUGHPUT if _has(runs, name)])),
        ("Memory and time against the plan", _against_plan(runs)),
        ("Hours", "\n".join(_hours(run, colour) for run, colour in _coloured(runs))),
        ("Samples", "\n".join(_samples(run, len(runs) > 1) for run in runs)),
        ("Config", _differing(runs) if len(runs) > 1 else _from_defaults(runs[0])),
    ]
    body = "\n".join(section(title, content) for title, content in sections if content.strip())
    title = " · ".join(run.name for run in runs)
    return document(title, f"{_legend(runs)}<div class=wide>{_head(runs)}</div>\n{body}", STYLE)


def _coloured(runs: Sequence[Run]) -> Iterator[tuple[Run, str]]:
    return ((run, APART[i % len(APART)]) for i, run in enumerate(runs))


def _legend(runs: Sequence[Run]) -> str:
    return f"<p>{''.join(key(colour, run.name) for run, colour in _coloured(runs))}</p>" if len(runs) > 1 else ""


def _head(runs: Sequence[Run]) -> str:
    """What each run is and how far it is: a row a fact, a column a run."""
    facts = [_facts(run) for run in runs]
    return table(("", *(run.name for run in runs)), [(fact, *(f[fact] for f in facts)) for fact in facts[0]])


def _facts(run: Run) -> dict[str, str]:
    of_steps = f" of {run.steps:,}" if run.steps else ""
    return {
        "state": run.why if run.why.startswith(run.state) else f"{run.state}: {run.why}" if run.why else run.state,
        "train step": str(run.config.get("train_step", "-")),
        "steps": f"{run.step:,}{of_steps}",
        "model": model_line(run.config),
        "mesh": _mesh_line(run),
        "layout": _changed_line(run.config, "layout"),
        "last loss": number(run.last("loss")),
        "last eval_loss": number(run.last("eval_loss")),
        "restarts": str(run.restarts),
        "last line": clock(run.active),
        "folder": str(run.folder),
    }


def model_line(config: Mapping[str, Any]) -> str:
    """The size of the model, in the config's words: nothing is counted, as that would take JAX."""
    model = config["model"]
    names = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim", "num_experts", "vocab_size")
    sizes = [f"{name}={number(model[name])}" for name in (*names, "max_length") if model.get(name)]
    adapter = config.get("adapter")
    kind = adapter.get("kind", "none") if isinstance(adapter, dict) else "none"
    return ", ".join(sizes) + ("" if kind == "none" else f"; adapter: {kind}")


def _mesh_line(run: Run) -> str:
    mesh = run.config.get("mesh")
    axes = mesh.items() if isinstance(mesh, dict) else ()
    written = " x ".join(f"{axis}={'rest' if size == -1 else size}" for axis, size in axes if size != 1)
    start = run.last_event(*BEGINNINGS)
    devices = f", {start.figures['devices']} devices" if start and "devices" in start.figures else ""
    return (written or "one device") + devices


def _changed_line(config: Mapping[str, Any], group: str) -> str:
    changed = [row for row in changed_fields(config) if row[0].startswith(f"{group}.")]
    return ", ".join(f"{name.partition('.')[2]}={value}" for name, value, _ in changed) or "the defaults"


def _numbers(run: Run, name: str) -> list[curves.Point]:
    """What is not finite, or no number, is a gap."""
    return [(r["step"], r[name] if is_number(r[name]) else None) for r in run.metrics if name in r]


def _has(runs: Sequence[Run], name: str) -> bool:
    return any(is_number(record.get(name)) for run in runs for record in run.metrics)


def _curve_names(runs: Sequence[Run]) -> list[str]:
    """The figures to draw. One of training has that of the evaluation in it; what never changes is no curve."""
    names = sorted({name for run in runs for record in run.metrics for name in record})
    names = [name for name in names if name not in (*NO_CURVES, *THROUGHPUT) and _has(runs, name)]
    names = [name for name in names if name.removeprefix("eval_") == name or name.removeprefix("eval_") not in names]
    moving = [name for name in names if name in FIRST or len(_values(runs, name)) > 1]
    return sorted(moving, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def _values(runs: Sequence[Run], name: str) -> set[Any]:
    both = (name, f"eval_{name}")
    return {record[n] for run in runs for record in run.metrics for n in both if is_number(record.get(n))}


def _figures(runs: Sequence[Run], names: Sequence[str]) -> str:
    if not names:
        return ""
    drawn = "\n".join(_figure(runs, name) for name in names)
    dotted = '<p class="note">Dotted: held out.</p>' if any(_has(runs, f"eval_{name}") for name in names) else ""
    return f"{_legend(runs)}<div class=figures>{drawn}</div>{dotted}"


def _figure(runs: Sequence[Run], name: str) -> str:
    """A metric of all runs, with the same of the evaluation; of a single run, what happened on the way."""
    drawn, shown = [], [name, f"eval_{name}"]
    for run, colour in _coloured(runs):
        for metric in shown:
            points = _numbers(run, metric)
            if any(value is not None for _, value in points):
                whose = f"{run.name}: {metric}" if len(runs) > 1 else metric
                drawn.append(Curve(whose, colour, points, held_out=metric != name))
    present = [metric for metric in shown if _has(runs, metric)]
    title = " and ".join(present) + (f": {_last(runs[0], present)}" if len(runs) == 1 else "")
    last = max(step for curve in drawn for step, _ in curve.points)
    marks = [mark for mark in _step_marks(runs[0]) if mark.at <= last] if len(runs) == 1 else []
    return curves.figure(title, drawn, marks, name in LOGARITHMIC, from_zero=name in THROUGHPUT)


def _last(run: Run, metrics: Sequence[str]) -> str:
    return ", ".join(number(run.last(metric)) for metric in metrics)


def _kind(event: Event) -> str | None:
    """How an event is marked; None where it is not."""
    if event.is_fault:
        return "fault"
    return {"saved": "save", "resumed": "restart", "started": "restart"}.get(event.name)


def _step_marks(run: Run) -> list[Mark]:
    """Restarts and faults, one mark a step and kind."""
    found = {(event.step, _kind(event)): event for event in run.events if event.step}
    marks = [Mark(step, kind, _told(event)) for (step, kind), event in found.items() if kind in ("restart", "fault")]
    return marks[-SHOWN_MARKS:]


def _told(event: Event) -> str:
    """An event in a line."""
    return f"{event.name}, step {event.step}" + (f": {event.message}" if event.message else "")


def _against_plan(runs: Sequence[Run]) -> str:
    """Bytes of a device and seconds of a step: what was planned, compiled and measured last."""
    rows = []
    for run in runs:
        for name in ("planned", "compiled", "measured"):
            event = run.last_event(name)
            if event:
                size, seconds = event.figures.get("bytes"), event.figures.get("seconds")
                written = gigabytes(size) if is_number(size) else "-"
                rows.append((run.name, name, written, number(seconds) if is_number(seconds) else "-"))
        seconds = run.last("seconds_per_step")
        if rows and rows[-1][0] == run.name and seconds is not None:
            rows.append((run.name, "last logged", "-", number(seconds)))
    return table(("run", "", "memory a device", "seconds a step"), rows, numbers=(2, 3)) if rows else ""


def _hours(run: Run, colour: str) -> str:
    """When the run was at work and what happened, as a strip and as a table."""
    times = moments(run.metrics, run.events)
    head = f"<h3>{html.escape(run.name)}</h3>"
    if not times:
        return f'{head}<p class="note">Its lines do not say when they were written.</p>' if run.metrics else ""
    beginnings = [event.time for event in run.events if event.name in BEGINNINGS and event.time is not None]
    marks = [
        Mark(event.time, kind, f"{clock(event.time)}: {_told(event)}")
        for event in run.events
        if event.time is not None and (kind := _kind(event))
    ]
    rows = [(clock(e.time), "-" if e.step is None else e.step, e.name, _message(e)) for e in run.events]
    events = table(("time", "step", "event", "message"), rows, numbers=(1,)) if rows else ""
    keys = key("#54a24b", "start, restart") + key("#e45756", "fault") + key("var(--faint)", "save")
    strip = curves.strip(curves.spells(times, beginnings), marks, colour)
    return f"{head}{strip}<p>{keys}</p><div class=events>{events}</div>"


def _message(event: Event) -> str:
    figures = ", ".join(f"{name} {number(value)}" for name, value in event.figures.items())
    return " | ".join(part for part in (event.message, figures) if part)


def _samples(run: Run, several: bool) -> str:
    """The newest first."""
    if not run.samples:
        return ""
    drawn = [
        f'<div class="sample"><span class="note">step {sample.step:,}, reward {number(sample.reward)}</span>'
        f"<pre><b>{html.escape(sample.prompt)}</b>{html.escape(sample.text)}</pre></div>"
        for sample in run.samples
    ]
    head = f"<h3>{html.escape(run.name)}</h3>" if several else ""
    older = "".join(drawn[SHOWN_SAMPLES:])
    folded = f"<details><summary>{len(drawn) - SHOWN_SAMPLES} older ones</summary>{older}</details>" if older else ""
    return head + "".join(drawn[:SHOWN_SAMPLES]) + folded


def _flat(config: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{group}{name}.")
        else:
            yield f"{group}{name}", list(value) if isinstance(value, tuple) else value


def changed_fields(config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, value, default) of what is not the default; a dash where there is no such field any more."""
    known = dict(_flat(base_config().to_dict()))
    return [(name, value, known.get(name, "-")) for name, value in _flat(config) if known.get(name, "-") != value]


def _from_defaults(run: Run) -> str:
    changed = changed_fields(run.config)
    rows = [(f"config.{name}", value, default) for name, value, default in changed]
    return (
        f"<details><summary>{len(rows)} fields that differ from the defaults</summary>"
        f"{table(('field', 'value', 'default'), rows)}</details>"
    )


def _differing(runs: Sequence[Run]) -> str:
    """The fields in which the runs differ, and only those."""
    found = [dict(_flat(run.config)) for run in runs]
    names = list(dict.fromkeys(name for fields in found for name in fields))
    rows = [(f"config.{name}", *(fields.get(name, "-") for fields in found)) for name in names]
    rows = [row for row in rows if any(value != row[1] for value in row[2:])]
    return table(("field", *(run.name for run in runs)), rows) if rows else "<p>They do not differ.</p>"


def with_names_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs in folders of one name are called by their paths."""
    names = [run.name for run in runs]
    return [run._replace(name=str(Path(run.folder))) if names.count(run.name) > 1 else run for run in runs]
