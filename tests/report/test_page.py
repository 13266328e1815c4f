"""The page: sound HTML that needs nothing else, the numbers of the files, and no text of theirs as markup."""

import json
import re
from html.parser import HTMLParser

import pytest

from jaxllm.report.page import page, with_names_apart
from jaxllm.report.run import read_run
from tests.report.made_up import NOW, event, make_run, records

EVIL = "<script>alert('&')</script>"
EMPTY = ("meta", "br", "hr", "img", "link")


class Balance(HTMLParser):
    """Fails on a tag that is not closed in its place; keeps what would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "xlink:href")]
        self.scripts += tag == "script"
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.open)


def checked(*folders) -> str:
    text = page(with_names_apart([read_run(folder, NOW) for folder in folders]))
    parser = Balance()
    parser.feed(text)
    parser.close()
    assert not parser.open and not parser.loads and not parser.scripts
    assert "http" not in text and "url(" not in text and "@import" not in text
    return text


def sections(text: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", text)


@pytest.fixture
def full(tmp_path):
    """A run with everything there is to show."""
    lines = [record | {"learning_rate": 1e-3, "mfu": 0.4, "reward": record["step"] / 7} for record in records(10)]
    lines[4] |= {"eval_loss": 7.7, "eval_bits_per_char": 2.5}
    lines[9] |= {"eval_loss": 7.2, "eval_bits_per_char": 2.0}
    events = [
        event("planned", ago=400, message="planned", bytes=2e9, seconds=1.5),
        event("compiled", ago=390, bytes=2.5e9),
        event("started", ago=380, devices=8),
        event("spike", 40, 200, EVIL),
        event("resumed", 40, 190, devices=8),
        event("never heard of", 50, 180, "all the same"),
        event("measured", 60, 170, bytes=2.25e9, seconds=1.75),
        event("done", 100, 60, "done: run"),
    ]
    samples = {step: [{"prompt": "却说曹操", "answer": EVIL, "reward": step / 8}] for step in range(20)}
    return make_run(tmp_path / "run", lines, events, samples)


def test_everything_is_there(full):
    text = checked(full)
    assert sections(text) == ["Curves", "Throughput", "Memory and time against the plan", "Hours", "Samples", "Config"]
    for part in ("100 of 100", "num_layers=4", "data=rest, 8 devices", "done: run", "never heard of", "all the same"):
        assert part in text, part
    for part in ("2.00 GB", "2.50 GB", "2.25 GB", "1.75", "<td>config.train.steps</td>"):
        assert part in text, part
    for part in ("step 19, reward 2.375", "却说曹操", "8 older ones"):
        assert part in text, part
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert [title.partition(":")[0] for title in titles] == [
        "loss and eval_loss",
        "eval_bits_per_char",
        "grad_norm",
        "learning_rate",
        "reward",
        "tokens_per_second",
        "mfu",
        "seconds_per_step",
    ]


def test_texts_of_files_are_no_markup(full, tmp_path):
    config = json.loads((full / "config.json").read_text())
    config["data"]["path"] = config["train_step"] = EVIL
    evil = make_run(
        tmp_path / "<img src=x>", [{"step": 1, "loss": 1.0, EVIL: 1.0}, {"step": 2, "loss": 1.0, EVIL: 2.0}]
    )
    (evil / "config.json").write_text(json.dumps(config))
    for text in (checked(full), checked(evil), checked(full, evil)):
        assert "&lt;script&gt;" in text and "<img" not in text


def test_the_curve_of_the_loss(full):
    """Steps 0 to 100 from x = 62 to 448; the loss, 7.9 to 7.0, with the held-out 7.7 and 7.2 inside, y = 194 to 8."""
    text = checked(full)
    written = re.search(r'<path class="curve" stroke="#4c78a8" d="([^"]*)"><title>loss</title>', text)[1]
    found = [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", written)]
    room = 0.04 * 0.9
    place = lambda step, value: (62 + 3.86 * step, 194 - 186 * (value - (7.0 - room)) / (0.9 + 2 * room))  # noqa: E731
    assert len(found) == 10
    for step, point in zip(range(10, 101, 10), found, strict=True):
        assert point == pytest.approx(place(step, 8 - step / 100), abs=0.01)
    held_out = re.search(
        r'<path class="curve held-out" stroke="#4c78a8" d="M([\d.]+) ([\d.]+)h0L([\d.]+) ([\d.]+)"', text
    )
    assert [float(number) for number in held_out.groups()] == pytest.approx(
        [*place(50, 7.7), *place(100, 7.2)], abs=0.01
    )


def test_several_runs_have_a_colour_each_and_their_differences(full, tmp_path):
    other = make_run(tmp_path / "other", records(5), [event("started", ago=90)], steps=200)
    text = checked(full, other)
    assert "run · other" in text and "running" in text and "done: run" in text
    for colour, name in (("#4c78a8", "run: loss"), ("#f58518", "other: loss")):
        assert re.search(rf'stroke="{colour}" d="[^"]*"><title>{name}</title>', text), name
    config = text[text.index("<h2>Config") :]
    assert re.findall(r"<td>(config\..*?)</td>", config) == ["config.train.steps"]
    assert "<td>100</td><td>200</td>" in config


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / name / "run", records(2)) for name in ("a", "b")]
    text = checked(*folders)
    assert "a/run: loss" in text and "b/run: loss" in text and "They do not differ." in text


def test_a_run_that_logged_nothing(tmp_path):
    text = checked(make_run(tmp_path / "run"))
    assert sections(text) == ["Config"]


def test_an_old_run_without_times(tmp_path):
    text = checked(make_run(tmp_path / "run", records(10, timed=False)))
    assert "done" in text and "do not say when" in text


def test_numbers_that_are_none(tmp_path):
    lines = [{"step": 1, "loss": None, "reward": "high"}, {"step": 2, "loss": float("nan"), "kl": float("inf")}]
    assert "<path" not in checked(make_run(tmp_path / "run", lines))
    text = checked(make_run(tmp_path / "run", [*lines, {"step": 3, "loss": 1.0, "kl": [3]}]))
    assert "<path" in text and "nan" not in text
