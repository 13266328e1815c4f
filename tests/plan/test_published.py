"""The planner against runs that were published: time and memory within 15 %. tests/plan/published.toml has the runs."""

import pytest

from jaxllm.layout.config import LayoutConfig
from jaxllm.model.config import ModelConfig
from jaxllm.plan.clusters import load_cluster
from jaxllm.plan.job import Job
from jaxllm.plan.memory import memory, stage_memory
from jaxllm.plan.practice import TORCHTITAN
from jaxllm.plan.time import step_time
from tests.plan.published import published_runs

RUNS = {run.name: run for run in published_runs()}
TIMED = [name for name, run in RUNS.items() if run.seconds and not run.is_validation]
VALIDATION = [name for name, run in RUNS.items() if run.is_validation]
WEIGHED = [name for name, run in RUNS.items() if "memory_gb" in run.measured]


@pytest.mark.parametrize("name", TIMED)
def test_seconds_of_a_step(name):
    run = RUNS[name]
    assert step_time(run.job).total == pytest.approx(run.seconds, rel=0.15)


@pytest.mark.parametrize("name", WEIGHED)
def test_memory(name):
    run = RUNS[name]
    assert memory(run.job).total / 1e9 == pytest.approx(run.measured["memory_gb"], rel=0.15)


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if "static_gb" in run.measured])
def test_static_memory(name):
    run = RUNS[name]
    assert memory(run.job).static / 1e9 == pytest.approx(run.measured["static_gb"], rel=0.03)


def test_runs_of_another_trainer():
    """30 of llm-foundry's, two figures for its kind, none a run: four in five within 15 %, the worst within 25 %."""
    errors = [abs(step_time(RUNS[name].job).total / RUNS[name].seconds - 1) for name in VALIDATION]
    assert len(errors) == 30 and sum(error <= 0.15 for error in errors) >= 24 and max(errors) < 0.25


def test_the_trials_of_bloom_are_ranked_as_measured():
    names = [name for name in TIMED if name.startswith("BLOOM") and RUNS[name].job.model.num_layers == 70]
    by_plan = sorted(names, key=lambda name: step_time(RUNS[name].job).total)
    assert by_plan == sorted(names, key=lambda name: RUNS[name].seconds)
    slower = [name for name in TIMED if name.startswith("181B")]
    by_plan = sorted(slower, key=lambda name: -step_time(RUNS[name].job).total)
    assert by_plan[0] == "181B, pipeline 12, microbatch 1"


@pytest.mark.xfail(strict=True, reason="counted at 64 GB; why it ran out of 80 GB was not published")
def test_what_ran_out_of_memory_is_refused():
    job = RUNS["BLOOM search: 206B"].job
    assert memory(job).total > job.cluster.usable_bytes


def test_model_states_of_a_trillion_parameters():
    """Rajbhandari et al. 2020, table 1: ZeRO 3 on 1,024 GPUs keeps 15.6 GB of model states on each."""
    model = ModelConfig(num_layers=128, embed_dim=25_515, num_heads=105, vocab_size=50_000, max_length=1024).resolved()
    mesh = {"pipeline": 1, "replica": 1, "data": 1024, "expert": 1, "context": 1, "model": 1}
    job = Job(model, mesh, LayoutConfig(zero_stage=3), load_cluster("v100-32gx16"), 1024, 1024, "float16", TORCHTITAN)
    assert stage_memory(job, 0).static / 1e9 == pytest.approx(15.6, rel=0.01)
