"""Config files and the overrides laid over them."""

import pytest

from jaxllm.cli.config_file import load_config, merge
from jaxllm.cli.flags import split_overrides
from jaxllm.errors import UserError

FILE = """
from jaxllm.train.config import base_config

def get_config(size="4"):
    config = base_config()
    config.model.update(num_layers=int(size))
    return config
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(FILE)
    return str(path)


def test_overrides_take_the_type_of_the_field(file):
    config = load_config(
        file,
        {
            "mesh.data": "-1",
            "train.steps": "1_000",
            "optimizer.learning_rate": "3e-4",
            "layout.scan_layers": "False",
            "data.path": "三国.txt",
            "seed": "7",
        },
    )
    assert config.mesh.data == -1
    assert config.train.steps == 1000
    assert config.optimizer.learning_rate == 3e-4
    assert config.layout.scan_layers is False
    assert config.data.path == "三国.txt"
    assert config.seed == 7


def test_the_file_takes_an_argument_after_a_colon(file):
    assert load_config(file, {}).model.num_layers == 4
    assert load_config(f"{file}:12", {}).model.num_layers == 12


def test_a_plain_dictionary_of_a_few_fields_will_do(tmp_path):
    path = tmp_path / "small.py"
    path.write_text("def get_config():\n    return {'seed': 3, 'mesh': {'model': 2}}\n")
    config = load_config(str(path), {})
    assert (config.seed, config.mesh.model, config.train.steps) == (3, 2, 1000)


def test_splitting_overrides_from_flags():
    argv = [
        "--workdir",
        "w",
        "--config",
        "c.py",
        "--config.mesh.data",
        "-1",
        "--config.a.b=x=y",
        "--config.layout.scan_layers",
    ]
    rest, overrides = split_overrides([*argv, "--noconfig.data.shuffle", "--process_id", "3"])
    assert rest == ["--workdir", "w", "--config", "c.py", "--process_id", "3"]
    assert overrides == {"mesh.data": "-1", "a.b": "x=y", "layout.scan_layers": "true", "data.shuffle": "false"}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"mesh.modle": "2"}, "config.mesh.modle is not a field. Did you mean 'config.mesh.model'?"),
        ({"mseh.model": "2"}, "config.mseh.model is not a field. Did you mean 'config.mesh.model'?"),
        ({"model.learning_rate": "1"}, "Did you mean 'config.optimizer.learning_rate'?"),
        ({"steps": "5"}, "config.steps is not a field. Did you mean 'config.train.steps'?"),
        ({"mesh": "3"}, "config.mesh is a group. Set a field: context, data,"),
        ({"mesh.model.size": "3"}, "config.mesh.model=1 is no group, so there is no config.mesh.model.size"),
        ({"mesh.model": "two"}, "--config.mesh.model=two must be a whole number; it is 1 now."),
        ({"train.steps": "1.5"}, "--config.train.steps=1.5 must be a whole number; it is 1000 now."),
        ({"optimizer.learning_rate": "fast"}, "must be a number; it is 0.0003 now."),
        ({"layout.scan_layers": "maybe"}, "must be true or false; it is True now."),
        ({"": "3"}, "config. is not a field."),
    ],
)
def test_override_mistakes(file, overrides, says):
    with pytest.raises(UserError) as error:
        load_config(file, overrides)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def get_config(:\n", ":1: SyntaxError"),
        ("\n\nimport no_such_module\n", ":3: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config():\n    return 1 / 0\n", ":2: ZeroDivisionError: division by zero"),
        ("def config():\n    pass\n", "has no function get_config()"),
        ("def get_config():\n    return 3\n", "get_config() returned 3"),
        (
            FILE.replace("num_layers=int(size)", "num_layer=2"),
            ":6: 'num_layer' is not a field. Did you mean 'num_layers'?",
        ),
        (FILE.replace("num_layers=int(size)", "num_layers='x'"), ":6: 'num_layers' is set to what it cannot be"),
        ("def get_config():\n    return {'mesh': {'modle': 2}}\n", "Did you mean 'config.mesh.model'?"),
        ("def get_config():\n    return {'mesh': {'model': 'x'}}\n", "config.mesh.model='x' must be a whole number"),
    ],
)
def test_config_file_mistakes(tmp_path, text, says):
    path = tmp_path / "experiment.py"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(str(path), {})
    assert says in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def test_a_missing_config_file_is_told_the_nearest(file, tmp_path):
    with pytest.raises(UserError, match=r"exprmnt.py: no such file. Did you mean 'experiment.py'\?"):
        load_config(str(tmp_path / "exprmnt.py"), {})


def test_a_value_where_a_group_belongs():
    with pytest.raises(UserError, match=r"config\.model=5: config\.model is a group. Set a field: .*num_layers"):
        merge({"model": 5})
