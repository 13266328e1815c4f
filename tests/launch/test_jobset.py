"""launch/kubernetes/jobset.yaml: what has to agree in it does, and jaxllm can be started from what it says."""

from pathlib import Path

import pytest
import yaml

from jaxllm.cli import distributed
from jaxllm.cli.flags import Parser
from jaxllm.errors import MISTAKE, RESTARTABLE, STOPPED

FILE = Path(__file__).parents[2] / "launch" / "kubernetes" / "jobset.yaml"


@pytest.fixture(scope="module")
def jobset() -> dict:
    return yaml.safe_load(FILE.read_text())


def test_its_fields_are_those_of_a_jobset_and_of_an_indexed_job(jobset):
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) <= {"network", "failurePolicy", "replicatedJobs", "successPolicy", "coordinator"}
    (job,) = jobset["spec"]["replicatedJobs"]
    assert set(job) == {"name", "replicas", "template"}
    spec = job["template"]["spec"]
    assert set(spec) == {"completionMode", "parallelism", "completions", "backoffLimit", "podFailurePolicy", "template"}
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # which a podFailurePolicy asks for


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
