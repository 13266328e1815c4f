"""The parity matrix: layouts drawn from all legal ones give the numbers of one device (tests/parity.py)."""

import pytest

from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.mesh import AXES
from jaxllm.layout.schedules import SCHEDULES
from jaxllm.train.config import Config
from tests.parity import MICROBATCHES, MODELS, NUMBERS, PARAMS, Case, all_cases, compare, differences, draw, reference

CASES = draw(60, seed=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout_trains_to_the_numbers_of_one_device(case):
    found = differences(case)
    assert found.numbers <= NUMBERS and found.params <= PARAMS, found


@pytest.mark.parametrize(("model", "rules"), [("gpt2", "2d"), ("llama", "2d"), ("llama", "fsdp")])
def test_rule_sets_in_a_pipeline(model, rules):
    layout = LayoutConfig(rules=rules, zero_stage=3, num_microbatches=4, schedule="zero_bubble")
    case = Case(model, Config(mesh=MeshConfig(pipeline=2, data=2, model=2), layout=layout))
    found = differences(case)
    assert found.numbers <= NUMBERS and found.params <= PARAMS, found


def test_everything_is_drawn():
    def drawn(field, cases=CASES):
        return {field(case) for case in cases}

    assert drawn(lambda case: case.model) == set(MODELS)
    assert drawn(lambda case: case.schedule) == {"", *SCHEDULES}
    assert drawn(lambda case: case.config.layout.zero_stage) == set(range(4))
    assert drawn(lambda case: case.config.layout.sequence_parallel) == {False, True}
    assert drawn(lambda case: case.config.layout.num_microbatches) == set(MICROBATCHES)
    assert drawn(lambda case: case.context_attention) == drawn(lambda case: case.context_attention, all_cases())
    for axis in AXES:
        split = lambda case, axis=axis: getattr(case.config.mesh, axis) > 1  # noqa: E731
        assert drawn(split) == drawn(split, all_cases()), axis
    assert sum(case.config.mesh.pipeline > 1 for case in CASES) > len(CASES) / 2
    assert len(set(CASES)) == len(CASES)


def test_what_differs_is_seen():
    expected = reference("llama")
    path = ("layers", "mlp", "up", "kernel")

    def changed(tree, path):
        if not path:
            other = tree.copy()
            other.flat[3] += 2 * PARAMS * abs(tree).max()
            return other
        return tree | {path[0]: changed(tree[path[0]], path[1:])}

    assert compare(expected, expected) == (0, 0)
    assert not compare(expected._replace(params=changed(expected.params, path)), expected).within
    assert not compare(expected._replace(numbers=expected.numbers * (1 + 2 * NUMBERS)), expected).within
