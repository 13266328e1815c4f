"""launch/docker/: the Compose file by its public schema, and what Dockerfile, Compose file and repository say together.

No image is built: that takes a Docker daemon.
"""

import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema

from jaxllm.cli import distributed
from jaxllm.cli.config_file import load_config
from jaxllm.cli.flags import Parser
from jaxllm.train.checks import check
from tests.launch.spoilt import with_a_misspelling, with_another_type

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "docker"
VALIDATOR = jsonschema.Draft202012Validator(get_builtin_schema("vendor.compose-spec"))
DEVICES = {"quickstart": 1, "process-0": 2, "process-1": 2, "gpu": 8}


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def stages() -> dict[str, list[str]]:
    """The lines of each stage of the Dockerfile, in order, with what each begins with in front."""
    found: dict[str, list[str]] = {}
    for line in (FOLDER / "Dockerfile").read_text().splitlines():
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            found[match[2]] = lines = [match[1]]
        elif found and line and not line.startswith("#"):
            lines.append(line)
    return found


def test_the_compose_file_is_valid(compose):
    VALIDATOR.validate(compose)


def test_no_field_of_it_can_be_misspelt_and_no_value_have_another_type(compose):
    names_are_free = lambda path: path in (("services",), ("volumes",)) or path[-1:] == ("environment",)  # noqa: E731
    misspelt = with_a_misspelling(compose, names_are_free)
    assert [path for path, spoilt in misspelt if VALIDATOR.is_valid(spoilt)] == []
    assert [path for path, spoilt in with_another_type(compose) if VALIDATOR.is_valid(spoilt)] == []


def test_both_targets_are_slim_and_begin_with_stages_that_are_there(stages):
    assert list(stages)[-2:] == ["cpu", "cuda"]  # the last is built where none is named
    for name, (base, *lines) in stages.items():
        assert base in stages or base == "python:${PYTHON}-slim", name
        assert all(source in stages for line in lines for source in re.findall(r"--from=(\S+)", line))
    for target in ("cpu", "cuda"):  # no compiler's leftovers, no cache of pip's: the environment is all that is copied
        base, *lines = stages[target]
        assert base == "slim" and [line for line in lines if not line.startswith("ENV")] == [
            f"COPY --from=install-{target} /opt/jaxllm /opt/jaxllm"
        ]
    assert not any(line.startswith("RUN") for line in stages["slim"])


def test_what_is_copied_is_in_the_repository_and_sent_to_the_builder(stages):
    sent = [line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    copied = [line.split()[1:-1] for lines in stages.values() for line in lines if re.match(r"COPY (?!--)", line)]
    copied = [source for sources in copied for source in sources]
    assert sorted(sent) == sorted(copied) and all((ROOT / source).exists() for source in sent)


def test_every_service_is_a_run_that_can_start(compose, stages):
    assert set(compose["services"]) == set(DEVICES)
    for name, service in compose["services"].items():
        assert service["build"]["target"] in stages
        assert (FOLDER / service["build"]["context"]).resolve() == ROOT
        assert (ROOT / service["build"]["dockerfile"]) == FOLDER / "Dockerfile"
        verb, config, workdir, *overrides = service["command"]
        assert verb == "train" and workdir.startswith("--workdir=/runs/")
        fields = dict(flag.removeprefix("--config.").split("=") for flag in overrides)
        path = ROOT / config.removeprefix("--config=")
        check(load_config(str(path), fields), DEVICES[name])
        named = [volume.partition(":")[0] for volume in service["volumes"] if volume[0] not in "./$"]
        assert set(named) <= set(compose["volumes"])


def test_the_two_processes_find_each_other(compose):
    parser = Parser("train", "")
    distributed.add_flags(parser)
    processes = {name: service for name, service in compose["services"].items() if service["profiles"] == ["processes"]}
    for number, service in enumerate(processes.values()):
        found = distributed.arguments(parser.parse([]), service["environment"])
        assert (found["process_id"], found["num_processes"]) == (number, len(processes))
        assert found["coordinator_address"].partition(":")[0] == next(iter(processes))
    assert len({str(service["volumes"]) for service in processes.values()}) == 1  # they share their runs
