"""Which folders are runs, and the table of them."""

import json

from jaxllm.report.listing import as_dict, find_runs, lines, newest_first
from jaxllm.report.run import read_run
from tests.report.made_up import NOW, event, make_run, records


def test_runs_and_their_adapters_are_found(tmp_path):
    for name in ("a", "b/c", "a/adapters/x", "a/checkpoints/10", "a/tensorboard/y", "1/2/3/4", "1/2/3/4/5", ".hidden"):
        make_run(tmp_path / name)
    for name, text in (
        ("a/huggingface", '{"architectures": []}'),
        ("models/llama", '{"architectures": []}'),
        ("d", "{"),
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "loop").symlink_to(tmp_path)
    found = [str(run.folder.relative_to(tmp_path)) for run in find_runs(tmp_path)]
    assert found == ["1/2/3/4", "a", "a/adapters/x", "b/c"]
    assert [run.folder for run in find_runs(tmp_path / "a")] == [tmp_path / "a", tmp_path / "a/adapters/x"]


def test_a_row(tmp_path):
    events = [event("started", ago=900), event("resumed", 40, ago=800)]
    make_run(tmp_path / "fresh", [*records(5, 100), {"step": 60, "eval_loss": 7.0}], events)
    make_run(tmp_path / "old", records(10, 200_000), [event("done", 100, 200_000)])
    runs = newest_first(read_run(tmp_path / name, NOW) for name in ("old", "fresh"))
    head, first, second = lines(runs, tmp_path, NOW)
    assert head.split()[:3] == ["run", "state", "step"]
    assert first.split() == ["fresh", "running", "60/100", "7.5", "7", "550", "2", "min", "ago", "1"]
    assert second.split() == ["old", "done", "100/100", "7", "-", "600", "2", "d", "7", "h", "ago", "0"]


def test_a_row_for_programs(tmp_path):
    lost = [*records(5), {"step": 60, "loss": None}]
    row = as_dict(read_run(make_run(tmp_path / "run", lost), NOW), tmp_path)
    assert json.loads(json.dumps(row, allow_nan=False)) == {
        "run": "run",
        "state": "running",
        "why": "",
        "step": 60,
        "steps": 100,
        "loss": None,
        "eval_loss": None,
        "tokens_per_second": 550.0,
        "last_activity": NOW - 60,
        "restarts": 0,
    }
