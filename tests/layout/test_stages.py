"""Which layers a stage holds, and how they come there."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxllm.errors import UserError
from jaxllm.layout import stages as stages_room
from jaxllm.layout import zero
from jaxllm.layout.at_rest import shape_at_rest
from jaxllm.layout.collectives import collectives
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.layout.stages import collect, deal, make_stages, num_layers_of


def test_equal_stages():
    stages = make_stages(8, 4)
    assert stages.counts == (2, 2, 2, 2) and stages.is_canonical
    assert stages.numbers.tolist() == [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]]


def test_virtual_stages_go_round_the_devices():
    """Narayanan et al. 2021, figure 4: with 2 devices and 2 virtual stages device 0 holds layers 0, 1 and 4, 5."""
    stages = make_stages(8, 2, 2)
    assert stages.numbers.tolist() == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert not stages.is_canonical
    assert stages.numbers.ravel()[stages.places].tolist() == list(range(8))


def test_light_ends_are_those_of_bloom():
    assert make_stages(70, 12, 1, "light_ends").counts == (5, *[6] * 10, 5)
    assert make_stages(6, 4, 1, "light_ends").counts == (1, 2, 2, 1)


def test_a_list_of_layers():
    stages = make_stages(7, 4, 1, "1,2,3,1")
    assert stages.counts == (1, 2, 3, 1)
    assert stages.numbers.tolist() == [[[0, -1, -1]], [[1, 2, -1]], [[3, 4, 5]], [[6, -1, -1]]]
    assert stages.numbers.ravel()[stages.places].tolist() == list(range(7))


WRONG = {
    "not divisible": ((7, 4), "num_layers=7 is not divisible by the 4 stages .*stage_layers=1,2,2,2"),
    "ends": (
        (8, 4, 1, "light_ends"),
        "8 layers [+] 2 are not divisible by the 4 stages. Nearest: .*stage_layers=2,2,2,2",
    ),
    "sum": ((8, 4, 1, "2,2,2,1"), "add up to config.model.num_layers=8 .these are 4, 7 in all.: say 2,2,2,2"),
    "number": ((8, 4, 2, "2,2,2,2"), "must be 8 counts"),
    "empty stage": ((8, 4, 1, "0,3,3,2"), "counts of at least 1"),
    "words": ((8, 4, 1, "few"), "'few' must be '', 'light_ends' or the layers of each stage"),
    "too few layers": ((3, 4), "num_layers=3 is less than the 4 stages"),
}


@pytest.mark.parametrize(("arguments", "says"), WRONG.values(), ids=WRONG.keys())
def test_layers_that_cannot_be_dealt(arguments, says):
    with pytest.raises(UserError, match=says) as error:
        make_stages(*arguments)
    offered = re.search(r"stage_layers=([\d,]+)$", str(error.value))
    if offered:  # the way out is one
        assert make_stages(*arguments[:2], 1, offered[1]).counts


@pytest.mark.parametrize(
    ("num_layers", "virtual", "stage_layers"), [(8, 1, ""), (8, 2, ""), (8, 1, "1,3,3,1"), (7, 1, "2,2,2,1")]
)
def test_dealt_and_collected(num_layers, virtual, stage_layers):
    """Each device holds its layers and no others, and no device ever holds the whole stack."""
    mesh = MeshConfig(pipeline=4, data=1, model=2)
    layout = make_layout(mesh, LayoutConfig(virtual_stages=virtual, stage_layers=stage_layers))
    stages = make_stages(num_layers, 4, virtual, stage_layers)
    axes = ("layers", "embed", "mlp")
    shape = shape_at_rest(layout, axes, (num_layers, 15, 30))  # `pipeline` divides no other dimension
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    w[num_layers:] = 0
    assert num_layers_of(len(w), 4, stage_layers) == num_layers
    at_rest = NamedSharding(layout.mesh, zero.state_spec(layout, axes, shape))
    w = jax.device_put(w, at_rest)

    @jax.jit
    def there_and_back(w):
        dealt = deal(layout, stages, w, axes)
        back = collect(layout, stages, dealt.astype(jnp.float32))
        return dealt, jax.lax.with_sharding_constraint(back, at_rest)

    dealt, back = there_and_back(w)
    np.testing.assert_array_equal(back, w)
    assert dealt.sharding.shard_shape(dealt.shape)[0] == 1
    for shard in dealt.addressable_shards:
        stage, columns = shard.index[0].start, shard.index[4]
        held = stages.numbers[stage]
        for place in np.argwhere(held >= 0):
            expected = np.asarray(w)[held[tuple(place)]][:, columns]
            np.testing.assert_array_equal(np.asarray(shard.data)[0, place[0], place[1]], expected)
    found = collectives(there_and_back.lower(w).compile().as_text(), layout.mesh)
    if stages.is_canonical:
        assert not found
    assert {c.kind for c in found} <= {"collective-permute"}, found
    assert len(found) <= 2 * stages.numbers[0].size, found  # there and back, at most a layer a place


def test_rounds_are_as_few_as_can_be():
    """Kőnig: the largest number that one stage sends or gets; in each, a stage sends one and gets one."""
    random = np.random.default_rng(0)
    for _ in range(30):
        moves = [(*random.integers(6, size=2), *random.integers(6, size=2)) for _ in range(random.integers(1, 40))]
        rounds = stages_room._rounds([tuple(map(int, move)) for move in moves], 6)
        assert sorted(move for together in rounds for move in together) == sorted(moves)
        for together in rounds:
            senders, receivers = [move[0] for move in together], [move[2] for move in together]
            assert len(set(senders)) == len(senders) and len(set(receivers)) == len(receivers)
        degrees = [np.bincount([move[side] for move in moves]).max() for side in (0, 2)]
        assert len(rounds) == max(degrees)
