"""What the HTML pages of jaxllm share. A page is one file that needs nothing else, no script, no network."""

import html
from collections.abc import Collection, Iterable, Sequence
from typing import Any

COLOURS = ("#4c78a8", "#72b7b2", "#9ecae9", "#f58518", "#e45756", "#b279a2", "#eeca3b", "#54a24b", "#9d755d", "#bab0ac")
STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #222; --faint: #666; --line: #ddd; }
@media (prefers-color-scheme: dark) { :root { --back: #16181c; --text: #ddd; --faint: #999; --line: #3a3d44; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1000px; padding: 0 1rem; }
body { color: var(--text); background: var(--back); }
section, .wide { overflow-x: auto; } h1, h2 { line-height: 1.2; } h2 { margin-top: 2rem; }
table { border-collapse: collapse; font-size: 13px; } td, th { padding: 2px 12px 2px 0; text-align: left; }
td, th { vertical-align: top; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.key { display: inline-block; width: 12px; height: 12px; margin: 0 4px 0 14px; } .note { color: var(--faint); }
"""


def document(title: str, body: str, style: str = "") -> str:
    """A whole page. `title` is text, `body` is HTML, `style` goes beside STYLE."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head><body>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def section(title: str, content: str) -> str:
    """A part of a page under its heading."""
    return f"<section><h2>{html.escape(title)}</h2>\n{content}</section>"


def key(colour: str, text: str) -> str:
    """What a colour means."""
    return f'<span class="key" style="background:{colour}"></span>{html.escape(text)}'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Collection[int] = ()) -> str:
    """A table of texts; the columns `numbers` are aligned on the right."""
    cell = lambda tag, i, value: f"<{tag}{' class=n' if i in numbers else ''}>{html.escape(str(value))}</{tag}>"  # noqa: E731
    line = lambda tag, row: "<tr>" + "".join(cell(tag, i, value) for i, value in enumerate(row)) + "</tr>"  # noqa: E731
    return "<table>" + line("th", head) + "".join(line("td", row) for row in rows) + "</table>"
