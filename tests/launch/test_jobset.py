"""launch/kubernetes/jobset.yaml: it is valid by the schemas, what has to agree does, jaxllm can be started so."""

import json
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from jaxllm.cli import distributed
from jaxllm.cli.flags import Parser
from jaxllm.errors import MISTAKE, RESTARTABLE, STOPPED
from tests.launch.spoilt import with_a_misspelling, with_another_type

FILE = Path(__file__).parents[2] / "launch" / "kubernetes" / "jobset.yaml"
SCHEMA = json.loads((Path(__file__).parent / "jobset.v1alpha2.json").read_text())
KUBERNETES = "1.31"  # the first in which a podFailurePolicy is stable


@pytest.fixture(scope="module")
def jobset() -> dict:
    return yaml.safe_load(FILE.read_text())


def check(jobset: dict, kubernetes: str = KUBERNETES) -> None:
    """Holds it against the schemas: of the JobSet ours, of the Job inside those of a version of Kubernetes.

    Raises:
      jsonschema.ValidationError: a field that there is not, a value of another type.
    """
    jsonschema.validate(jobset, SCHEMA, jsonschema.Draft202012Validator)
    for replicated in jobset["spec"]["replicatedJobs"]:
        template = replicated["template"]
        metadata = jobset["metadata"] | template.get("metadata", {})
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": template["spec"]}
        kubernetes_validate.validate(job, kubernetes, strict=True)


def test_it_is_a_jobset_and_an_indexed_job(jobset):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for version in (KUBERNETES, kubernetes_validate.latest_version()):
        check(jobset, version)
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # which a podFailurePolicy asks for


def test_no_field_can_be_misspelt_and_no_value_have_another_type(jobset):
    names_are_free = lambda path: path[-1:] == ("limits",)  # noqa: E731
    misspelt = [path for path, spoilt in with_a_misspelling(jobset, names_are_free) if is_valid(spoilt)]
    mistyped = [path for path, spoilt in with_another_type(jobset) if is_valid(spoilt)]
    assert not misspelt and not mistyped


def is_valid(jobset: dict) -> bool:
    try:
        check(jobset)
    except jsonschema.ValidationError:
        return False
    return True


def test_each_pod_becomes_the_process_of_its_index(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    parser = Parser("train", "")
    distributed.add_flags(parser)
    name = jobset["metadata"]["name"]
    for index in range(spec["completions"]):
        found = distributed.arguments(parser.parse([]), environment | {"JOB_COMPLETION_INDEX": str(index)})
        assert found["num_processes"] == spec["completions"] and found["process_id"] == index
        assert found["coordinator_address"].startswith(f"{name}-{job['name']}-0-0.{name}:")


def test_only_what_would_come_again_ends_it(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [STOPPED, MISTAKE] and rule["action"] == "FailJob"
    assert max(rule["onExitCodes"]["values"]) < RESTARTABLE
    (on_mistake,) = jobset["spec"]["failurePolicy"]["rules"]
    assert on_mistake["action"] == "FailJobSet" and on_mistake["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_volumes_that_are_mounted_are_there(jobset):
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == names
