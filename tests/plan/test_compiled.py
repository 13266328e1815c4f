"""Steps compiled for GPUs that are not here, and for virtual CPU devices: XLA's figures by purpose."""

import dataclasses

import jax
import pytest

from jaxllm.cli.config_file import load_config
from jaxllm.errors import UserError
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.model.config import ModelConfig
from jaxllm.plan import gpu_free
from jaxllm.plan.clusters import load_cluster
from jaxllm.plan.compiled import compile_step, compiled_memory
from jaxllm.plan.expect import expected
from jaxllm.plan.job import make_job
from jaxllm.plan.memory import memory
from jaxllm.plan.program import make_program
from jaxllm.plan.traffic import axis_traffic
from jaxllm.train import loop, prepare
from jaxllm.train.config import Config
from jaxllm.train.state import bytes_per_device
from tests.plan.published import published_runs
from tests.train import tiny_run

CONFIGS = tiny_run.ROOT / "configs"
MODEL = ModelConfig(
    num_layers=4, embed_dim=256, num_heads=4, mlp_dim=1024, vocab_size=1024, max_length=256, positions="rope"
)
needs_plugin = pytest.mark.skipif(bool(gpu_free.missing()), reason=gpu_free.missing() or "-")


def config(**fields) -> Config:
    mesh = MeshConfig(**fields.pop("mesh", {"data": 8}))
    return dataclasses.replace(
        Config(),
        model=MODEL.resolved(),
        mesh=mesh,
        layout=LayoutConfig(**fields),
        data=dataclasses.replace(Config().data, batch_size=32, length=256),
    )


def compiled(config: Config, cluster: str = "h100x8", gpus: int = 8):
    cluster = load_cluster(cluster)
    with gpu_free.as_if_here(cluster):
        program = make_program(config, gpu_free.gpus(cluster, gpus))
        return program, compile_step(program, "GPUs")


@needs_plugin
@pytest.mark.parametrize("cluster", ["a100-80gx8", "h100x8", "b200x8"])
def test_a_step_for_gpus_that_are_not_here(cluster):
    """What is at rest is what the shardings say; the parts add up to XLA's total; NCCL's collectives in bfloat16."""
    layout = config(mesh={"data": 4, "model": 2}, zero_stage=2, num_microbatches=2)
    program, found = compiled(layout, cluster)
    stored = found.memory
    assert stored.parameters + stored.optimizer == bytes_per_device((program.state.params, program.state.optimizer))
    parts = stored.parameters + stored.optimizer + stored.batch + stored.weights + stored.gradients + stored.activations
    assert parts == pytest.approx(stored.total, rel=0.01)
    gathers = [row for row in found.collectives if row.kind == "all-gather" and row.mesh_axes == ("data",)]
    assert gathers and {row.runs for row in gathers if row.tensor.startswith("layers")} == {1}
    reduced = [row for row in found.collectives if row.kind == "reduce-scatter"]
    assert reduced, "on GPUs XLA makes reduce-scatters"
    assert all(buffer.bytes > 0 and buffer.shape for buffer in found.buffers) and len(found.buffers) > 5
    assert any("kept for the backward pass" in b.made_by and "hidden units" in b.what for b in found.buffers)


@needs_plugin
def test_asynchronous_collectives_are_counted_once():
    """Their start names operands and results: of a gather over 4 the result alone, four times the operand."""
    _, found = compiled(config(mesh={"data": 4, "model": 2}, zero_stage=1))
    gathered = [row for row in found.collectives if row.tensor == "layers.mlp.up.kernel" and row.kind == "all-gather"]
    assert [row.bytes for row in gathered] == [2 * 4 * 256 * 1024 // 2]


@needs_plugin
def test_traffic_beside_the_formulas():
    """Tensor parallelism: the two all-reduces forward and backward of the papers, within the embedding's."""
    layout = config(mesh={"data": 2, "model": 4}, zero_stage=1)
    _, found = compiled(layout)
    job = make_job(layout, load_cluster("h100x8"), 8)
    by_axis = {row.axis: row for row in axis_traffic(job, found.collectives)}
    assert by_axis["model"].sent == pytest.approx(by_axis["model"].theory, rel=0.4)
    assert by_axis["data"].sent == pytest.approx(by_axis["data"].theory, rel=0.4)
    assert not by_axis["data"].crosses_nodes


@needs_plugin
@pytest.mark.parametrize("remat", ["none", "selective", "full"])
@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "model": 4}], ids=["data", "model"])
def test_counted_memory_is_near_what_xla_needs(remat, mesh):
    """At sizes of one's own interest: Llama 8B's layers, eight of them."""
    big = load_config(str(CONFIGS / "llama3_8b.py"), {"model.vocab_size": "32000", "model.num_layers": "8"})
    layout = dataclasses.replace(big.layout, remat=remat, zero_stage=2, num_microbatches=1)
    data = dataclasses.replace(big.data, batch_size=8)
    big = dataclasses.replace(big, mesh=MeshConfig(**mesh), layout=layout, data=data, model=big.model.resolved())
    _, found = compiled(big)
    counted = memory(make_job(big, load_cluster("h100x8"), 8)).total
    assert counted == pytest.approx(found.memory.total, rel=0.2)


@needs_plugin
def test_bloom_under_its_published_layout():
    """176 billion parameters on 384 A100, 12 stages of unequal layers: compiled here, and it fits."""
    bloom = load_config(str(CONFIGS / "bloom_176b.py"), {})
    program, found = compiled(bloom, "jean-zay-a100", 384)
    assert program.spec.num_parameters == pytest.approx(176.2e9, rel=0.01)
    assert found.memory.total < load_cluster("jean-zay-a100").usable_bytes
    # Adam's 12 bytes a parameter over 384 devices; of the table, which `pipeline` does not divide, over 32.
    table = 250_880 * 14_336
    at_rest = 12 * ((program.spec.num_parameters - table) * 72 / 70 / 384 + table / 32)
    assert found.memory.parameters + found.memory.optimizer == pytest.approx(at_rest, rel=0.01)
    published = next(run for run in published_runs() if run.name == "BLOOM-176B")
    assert found.memory.total / 1e9 < 1.15 * published.measured["memory_gb"]


def test_plan_and_run_agree_on_virtual_devices(tmp_path, monkeypatch, capsys):
    """`memory_analysis` of the step that a run compiles, and of the plan's, on the same kind of devices: within 1 %."""
    told, steps, of_steps = [], [], prepare.compiled_line

    def expects(config: Config, layout):
        told.append(config)
        return expected(config, layout)

    def compiled_line(planned, step):
        steps.append(step.memory_analysis())
        return of_steps(planned, step)

    monkeypatch.setattr(prepare, "compiled_line", compiled_line)
    tiny_run.write_text(tmp_path / "text.txt")
    changes = {"train.steps": 2, "train.log_every": 1, "optimizer.warmup_steps": 1, "mesh.data": 2, "mesh.model": 2}
    config = tiny_run.tiny_config(tmp_path / "text.txt", tmp_path / "cache", **changes, **{"layout.zero_stage": 2})
    devices = jax.devices()[:4]
    assert loop.train(config, tmp_path / "run", devices=devices, expects=expects) == 0
    planned = compile_step(make_program(told[0], devices), "CPUs").memory.total
    run = steps[0]
    total = run.argument_size_in_bytes + run.temp_size_in_bytes + run.output_size_in_bytes - run.alias_size_in_bytes
    assert planned == pytest.approx(total, rel=0.01)
    said = capsys.readouterr().err
    assert "planned: " in said and "compiled: " in said and "is not in the planner's table: no time is planned" in said


def test_parts_of_memory_are_never_negative():
    program = make_program(config(mesh={"data": 8}, zero_stage=3), jax.devices())
    found = compiled_memory(program, program.lowered.compile())
    assert min(found) >= 0 and found.total > 0


def test_without_the_plugin_it_is_said(monkeypatch):
    monkeypatch.setattr(gpu_free, "missing", lambda: gpu_free.MISSING)
    with pytest.raises(UserError, match=r"The extra `plan` is not installed \(pip install 'jaxllm\[plan\]'\)"):
        gpu_free.gpus(load_cluster("h100x8"), 8)
