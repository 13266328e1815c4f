"""The parts of the planner's model against the formulas that they come from."""

import dataclasses

import pytest

from jaxllm.layout.config import LayoutConfig
from jaxllm.model.config import ModelConfig
from jaxllm.plan.clusters import load_cluster
from jaxllm.plan.job import Job
from jaxllm.plan.memory import full_bytes, kept_bytes, memory, stage_memory
from jaxllm.plan.practice import JAXLLM, MEGATRON_2021, MEGATRON_CORE
from jaxllm.plan.time import Message, Product, message_seconds, product_seconds, step_time
from jaxllm.plan.traffic import theory
from jaxllm.plan.work import layer_work, stage_weights

H100 = load_cluster("h100x8")
GPT = ModelConfig(num_layers=24, embed_dim=4096, num_heads=32, vocab_size=51_200, max_length=2048).resolved()
ONE = {"pipeline": 1, "replica": 1, "data": 1, "expert": 1, "context": 1, "model": 1}


def job(mesh=None, batch_size=8, practice=JAXLLM, model=GPT, **layout) -> Job:
    return Job(model, ONE | (mesh or {}), LayoutConfig(**layout), H100, batch_size, 2048, "bfloat16", practice)


def test_activations_are_those_of_the_papers_table():
    """Korthikanti et al. 2022, table 2: bytes a layer of GPT, without and with sequence parallelism."""
    s, b, h, a = 2048, 8, 4096, 32
    for t in (1, 2, 8):
        plain = full_bytes(job({"model": t}, practice=MEGATRON_2021))
        assert plain == pytest.approx(s * b * h * (10 + 24 / t + 5 * a * s / (h * t)), rel=1e-9)
        sequence = full_bytes(job({"model": t}, practice=MEGATRON_2021, sequence_parallel=True))
        assert sequence == pytest.approx(s * b * h / t * (34 + 5 * a * s / h), rel=1e-9)
        selective = kept_bytes(job({"model": t}, practice=MEGATRON_2021, remat="selective", sequence_parallel=True))
        assert selective == pytest.approx(34 * s * b * h / t, rel=1e-9)
    assert kept_bytes(job(practice=MEGATRON_2021, remat="full")) == 2 * s * b * h


@pytest.mark.parametrize(("stage", "a_parameter"), [(0, 16), (1, 4 + 12 / 8), (2, 2 + 14 / 8), (3, 16 / 8)])
def test_model_states_are_those_of_zero(stage, a_parameter):
    """Rajbhandari et al. 2020, for float16 gradients; at ZeRO 3 what computes is gathered from the state."""
    practice = dataclasses.replace(MEGATRON_2021, gradient_bytes=2, state_bytes=12)
    found = stage_memory(job({"data": 8}, practice=practice, zero_stage=stage), 0)
    expected = a_parameter - (2 / 8 if stage == 3 else 0)
    assert found.static == pytest.approx(expected * stage_weights(job(), 0), rel=1e-9)


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("microbatches", [8, 32])
def test_the_bubble_is_that_of_the_formula(stages, microbatches):
    """(P - 1) / (M + P - 1) of the step, where nothing but the layers takes time (GPipe, PipeDream-flush)."""
    practice = dataclasses.replace(MEGATRON_CORE, hides_pipeline=1.0, hides_data=1.0)
    even = dataclasses.replace(GPT, vocab_size=64, num_layers=64)
    found = step_time(job({"pipeline": stages}, microbatches, practice, even, num_microbatches=microbatches))
    formula = (stages - 1) / (microbatches + stages - 1)
    assert found.bubble / (found.total - found.optimizer) == pytest.approx(formula, rel=0.02)


def test_interleaving_divides_the_bubble():
    """Narayanan et al. 2021: by the number of virtual stages."""
    practice = dataclasses.replace(MEGATRON_CORE, hides_pipeline=1.0)
    even = dataclasses.replace(GPT, vocab_size=64, num_layers=64)
    plain = step_time(job({"pipeline": 4}, 32, practice, even, num_microbatches=32)).bubble
    fields = {"schedule": "interleaved", "virtual_stages": 4}
    assert step_time(job({"pipeline": 4}, 32, practice, even, num_microbatches=32, **fields)).bubble == plain / 4


def test_in_lock_step_an_aligned_schedule_is_faster():
    """layout/schedules.py: ticks of plain 1F1B hold forwards and backwards, and cost a backward."""
    plain, aligned = (
        step_time(job({"pipeline": 4}, 32, model=GPT, num_microbatches=32, schedule=name)).total
        for name in ("1f1b", "1f1b_aligned")
    )
    assert aligned < 0.85 * plain


def test_few_ticks_tell_what_many_cost():
    """The estimate of a long schedule is made from a short one; both are to agree with the whole table."""
    for name in ("1f1b", "zero_bubble", "gpipe"):
        times = [
            step_time(job({"pipeline": 4}, count, num_microbatches=count, schedule=name)).total
            for count in (24, 28, 32)
        ]
        assert times[2] - times[1] == pytest.approx(times[1] - times[0], rel=1e-6)


def test_products_fill_their_last_wave():
    """132 multiprocessors make 132 tiles of 128 x 256 at a time: one tile more takes as long as 132."""
    shape = lambda tiles: Product("", 128.0 * tiles, 8192.0, 256.0)  # noqa: E731
    one, full, more = (product_seconds(shape(tiles), job()) for tiles in (1, 132, 133))
    assert one == pytest.approx(full) and more == pytest.approx(2 * full)


def test_collectives_through_links_and_cards():
    wide = {"data": 2, "model": 8}
    inside = message_seconds(Message("", "all-reduce", "model", 1e9), job(wide))
    assert inside == pytest.approx(2 * 7 / 8 * 1e9 / (450e9 * 0.75), rel=0.02)
    outside = message_seconds(Message("", "all-gather", "data", 1e9), job(wide))
    assert outside == pytest.approx(1e9 / 2 / (50e9 * 0.8), rel=0.02)  # one card each
    together = message_seconds(Message("", "all-gather", "data", 1e9), job({"data": 16}))
    assert together == pytest.approx(15 / 16 * 1e9 / (8 * 50e9 * 0.8), rel=0.06)  # the cards of all eight
    assert message_seconds(Message("", "all-reduce", "model", 1e9), job()) == 0


def test_traffic_is_that_of_the_formulas():
    """Shoeybi et al. 2019: two all-reduces of s b h forward, two backward; Rajbhandari et al. 2020: 2 or 3 Psi."""
    size, t = 2 * 8 * 2048 * 4096, 8
    sent = theory(job({"model": t}))["model"]
    assert sent == pytest.approx(24 * 4 * 2 * (t - 1) / t * size)
    both = theory(job({"model": t}, sequence_parallel=True))["model"]
    assert both == pytest.approx(sent)
    weights, d = stage_weights(job(), 0), 8
    part = (d - 1) / d
    assert theory(job({"data": d}, zero_stage=1))["data"] == pytest.approx(part * weights * (4 + 2))
    assert theory(job({"data": d}, zero_stage=3))["data"] == pytest.approx(part * weights * (4 + 2 + 2))


def test_a_critic_and_a_reference_cost_their_passes():
    plain = step_time(job())
    assert step_time(job()._replace(forwards=1)).products > 1.2 * plain.products
    assert step_time(job()._replace(models=2.0)).products > 1.8 * plain.products
    assert memory(job()._replace(models=2.0)).static == pytest.approx(2 * memory(job()).static)
    assert step_time(job()._replace(trained=0.01)).products < 0.75 * plain.products


def test_experts_work_for_the_tokens_sent_to_them():
    sparse = dataclasses.replace(GPT, num_experts=16, experts_per_token=2)
    dense, routed = layer_work(job()), layer_work(job(model=sparse))
    by_name = lambda work: {p.name: p.flops for p in work.products}  # noqa: E731
    assert by_name(routed)["mlp, in"] == 2 * by_name(dense)["mlp, in"]
    assert by_name(routed)["attention's output"] == by_name(dense)["attention's output"]
