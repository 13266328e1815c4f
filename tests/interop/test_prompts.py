"""Prompt tuning, P-tuning and prefix tuning against PEFT: logits of packed rows, and what PEFT keeps, in float32."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxllm.interop.hf.load import load_params, open_directory
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.layout.scope import joined
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.prompt_trees import flattened, unflattened
from jaxllm.model.spec import model_spec
from tests.interop.hf.models import MODELS, VOCABULARY, make, save, torch

peft = pytest.importorskip("peft")

NUMBER, HIDDEN = 5, 24
LENGTHS = (11, 6, 9)
KINDS = {
    "prompt": AdapterConfig(kind="prompt"),
    "p_tuning_mlp": AdapterConfig(kind="p_tuning"),
    "p_tuning_lstm": AdapterConfig(kind="p_tuning", encoder="lstm"),
    "prefix": AdapterConfig(kind="prefix"),
    "prefix_projected": AdapterConfig(kind="prefix", prefix_projection=True),
}
KINDS = {name: dataclasses.replace(a, num_virtual_tokens=NUMBER, encoder_dim=HIDDEN) for name, a in KINDS.items()}


@functools.cache
def base(name: str, folder):
    directory = open_directory(save(make(*MODELS[name]), folder))
    layout = make_layout(MeshConfig(data=1), LayoutConfig(zero_stage=0), devices=jax.devices()[:1])
    return directory.spec.config, load_params(directory, layout)


@pytest.fixture(scope="module", params=["llama", "gpt2", "bloom", "mistral"])
def model(request, tmp_path_factory):
    """Name, our config and parameters."""
    return request.param, *base(request.param, tmp_path_factory.mktemp(request.param))


def adapted(name: str, kind: str):
    """The model of transformers with an adapter of PEFT, every weight of it random."""
    of_all = {"task_type": "CAUSAL_LM", "num_virtual_tokens": NUMBER}
    config = {
        "prompt": lambda: peft.PromptTuningConfig(**of_all),
        "p_tuning_mlp": lambda: peft.PromptEncoderConfig(**of_all, encoder_hidden_size=HIDDEN),
        "p_tuning_lstm": lambda: peft.PromptEncoderConfig(
            **of_all, encoder_hidden_size=HIDDEN, encoder_reparameterization_type="LSTM"
        ),
        "prefix": lambda: peft.PrefixTuningConfig(**of_all),
        "prefix_projected": lambda: peft.PrefixTuningConfig(
            **of_all, encoder_hidden_size=HIDDEN, prefix_projection=True
        ),
    }[kind]()
    theirs = peft.get_peft_model(make(*MODELS[name]), config).eval()
    encoder, draw = theirs.prompt_encoder["default"], np.random.default_rng(3)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.data = torch.from_numpy(draw.normal(0, 0.5, parameter.shape).astype(np.float32))
    return theirs, {name: value.detach().numpy() for name, value in encoder.named_parameters()}


def ours(config, kind: str, theirs: dict[str, np.ndarray]) -> dict:
    """The adapter's parameters, from those of PEFT's encoder."""
    if kind == "prompt":
        return {"virtual": {"embedding": theirs["embedding.weight"]}}
    if kind == "prefix":
        return unflattened(model_spec(config, KINDS[kind]), theirs["embedding.weight"])

    def linear(name: str, *shape: int) -> dict:
        return {
            "kernel": theirs[f"{name}.weight"].T.reshape(-1, *shape) if shape else theirs[f"{name}.weight"].T,
            "bias": theirs[f"{name}.bias"].reshape(shape) if shape else theirs[f"{name}.bias"],
        }

    if kind == "prefix_projected":
        encoder = {"first": linear("transform.0")}
        last = linear("transform.2", config.num_layers, 2, config.num_kv_heads, config.head_dim)
        sides = {
            side: {"kernel": np.moveaxis(last["kernel"][:, :, i], 1, 0), "bias": last["bias"][:, i]}
            for i, side in enumerate(("key", "value"))
        }
        virtual = {"embedding": theirs["embedding.weight"], "encoder": encoder}
        return {"virtual": virtual, "layers": {"attention": {"prefix": sides}}}
    if kind == "p_tuning_mlp":
        encoder = {place: linear(f"mlp_head.{i}") for i, place in {0: "first", 2: "second", 4: "third"}.items()}
    else:
        encoder = {place: linear(f"mlp_head.{i}") for i, place in {0: "first", 2: "second"}.items()}
        for number in range(2):
            for direction, suffix in {"forward": "", "backward": "_reverse"}.items():
                end = f"l{number}{suffix}"
                encoder[f"{direction}_{number}"] = {
                    "input_kernel": theirs[f"lstm_head.weight_ih_{end}"].T.reshape(-1, 4, HIDDEN),
                    "recurrent_kernel": theirs[f"lstm_head.weight_hh_{end}"].T.reshape(-1, 4, HIDDEN),
                    "input_bias": theirs[f"lstm_head.bias_ih_{end}"].reshape(4, HIDDEN),
                    "recurrent_bias": theirs[f"lstm_head.bias_hh_{end}"].reshape(4, HIDDEN),
                }
    return {"virtual": {"embedding": theirs["embedding.weight"], "encoder": encoder}}


def documents() -> list[np.ndarray]:
    draw = np.random.default_rng(1)
    return [draw.integers(3, VOCABULARY, length) for length in LENGTHS]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_what_peft_keeps(model, kind):
    """All documents in one row, each behind the places of its virtual tokens; for PEFT each alone."""
    name, config, params = model
    theirs, weights = adapted(name, kind)
    spec, own = model_spec(config, KINDS[kind]), ours(config, kind, weights)
    assert spec.num_trained_parameters == sum(w.size for w in weights.values())
    kept = theirs.get_prompt_embedding_to_save("default").numpy()
    np.testing.assert_allclose(flattened(spec, own), kept, atol=1e-5 * np.abs(kept).max())

    tokens = np.concatenate([np.r_[[1] * NUMBER, document] for document in documents()])[None]
    positions = np.concatenate([np.arange(NUMBER + length) for length in LENGTHS])[None]
    segments = np.repeat(np.arange(1, len(LENGTHS) + 1), [NUMBER + length for length in LENGTHS])[None]
    adapted_model = spec.merge(joined(params, own))
    logits = jax.jit(lambda *batch: adapted_model.head.logits(adapted_model(*batch)))(tokens, positions, segments)
    plain = model_spec(config).merge(params)
    for number, document in enumerate(documents(), start=1):
        with torch.no_grad():
            expected = theirs(input_ids=torch.tensor(document)[None]).logits[0].numpy()[-len(document) :]
        found = np.asarray(logits)[0][segments[0] == number][NUMBER:]
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
        assert np.abs(expected - plain.head.logits(plain(document[None]))[0]).max() > 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_there_and_back(model, kind):
    spec = model_spec(model[1], KINDS[kind])
    own = spec.own(spec.init(2))
    back = unflattened(spec, flattened(spec, own))
    assert jax.tree.structure(back) == jax.tree.structure(own)
    for one, other in zip(*map(jax.tree.leaves, (back, own)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_encoder_cannot_be_told_from_its_output(model):
    for kind in ("p_tuning_mlp", "prefix_projected"):
        with pytest.raises(ValueError, match="an encoder"):
            unflattened(model_spec(model[1], KINDS[kind]), np.zeros((NUMBER, 4)))
