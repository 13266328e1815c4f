"""Masks in prompts: filled with what is most probable there, alone or in a batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.data.tokenizer_training import train_tokenizer
from jaxllm.errors import UserError
from jaxllm.generate.fill import fill
from jaxllm.generate.run import cast_for_use
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.model.spec import model_spec

PROMPTS = ["the quick <mask> fox", "却说<mask><mask>追赶", "<mask>"]


@pytest.fixture(scope="module")
def bidirectional(run):
    """The model of the other tests, seeing both sides, with more rows than tokens, the last of them the largest."""
    text = ["却说曹操引兵追赶，玄德大惊。the quick brown fox jumps over the lazy dog\n"] * 20
    tokenizer = train_tokenizer(text, vocab_size=310, specials=["<mask>"])
    table = run.weights["embedding"]["table"]
    weights = run.weights | {"embedding": {"table": table.at[310:].multiply(100)}}
    return run._replace(
        spec=model_spec(dataclasses.replace(run.spec.config, causal=False)), weights=weights, tokenizer=tokenizer
    )


def test_a_mask_becomes_the_most_probable_token(bidirectional):
    tokenizer, model = bidirectional.tokenizer, bidirectional.spec.merge(bidirectional.weights)
    filled = fill(bidirectional, PROMPTS)
    assert [one.prompt for one in filled] == PROMPTS
    assert [len(one.tokens) for one in filled] == [1, 2, 1]
    before, after = tokenizer.encode_batch(["the quick", " fox"])
    ids = [tokenizer.bos_id, *before, tokenizer.mask_id, *after, tokenizer.eos_id]
    logits = np.asarray(model.head.logits(model(jnp.array([ids]))))[0, 1 + len(before)]
    assert logits.argmax() >= 310, "the largest are of no token"
    ordinary = sorted(set(range(310)) - set(tokenizer.specials.values()))
    assert filled[0].tokens == [max(ordinary, key=lambda token: logits[token])]
    assert filled[0].text == tokenizer.decode([*before, *filled[0].tokens, *after])


def test_a_batch_on_any_mesh_is_filled_like_each_prompt_alone(bidirectional):
    alone = [fill(bidirectional, [prompt])[0] for prompt in PROMPTS]
    assert fill(bidirectional, PROMPTS) == alone
    layout = make_layout(MeshConfig(data=2, model=2), LayoutConfig(zero_stage=0), devices=jax.devices()[:4])
    weights = cast_for_use(jax.device_get(bidirectional.weights), bidirectional.spec, layout, "float32")
    assert fill(bidirectional._replace(weights=weights, layout=layout), PROMPTS) == alone


def test_prompts_that_cannot_be_filled(run, bidirectional):
    with pytest.raises(UserError, match="Write <mask> where a token is missing"):
        fill(bidirectional, ["the quick fox"])
    with pytest.raises(UserError, match=r"a prompt has \d+ tokens, but the model's context is 64"):
        fill(bidirectional, ["<mask>" * 70])
    with pytest.raises(UserError, match="does not see what follows a mask"):
        fill(run, PROMPTS)
    with pytest.raises(UserError, match="a mask token, which its tokenizer lacks"):
        fill(bidirectional._replace(tokenizer=run.tokenizer), PROMPTS)
