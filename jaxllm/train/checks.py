"""Everything that can be said about a config before anything is compiled: each mistake with the nearest way out."""

import math

from jax.sharding import AbstractMesh

from jaxllm.config import one_of
from jaxllm.data.config import SUPERVISE, TRUNCATION
from jaxllm.data.packing import check_packing
from jaxllm.errors import UserError
from jaxllm.layout import schedules
from jaxllm.layout.check_rules import check_rules
from jaxllm.layout.layout import Layout
from jaxllm.layout.mesh import mesh_shape
from jaxllm.layout.named import is_named
from jaxllm.layout.rules import LOGICAL_AXES, Rules, make_rules, own_rows, parse_overrides
from jaxllm.layout.stages import make_stages
from jaxllm.model.adapter_config import BASE_WEIGHTS, ENCODERS, INITS, KINDS, PROMPT_INITS
from jaxllm.model.attention_backends import choose_backend
from jaxllm.model.rope import ROPE_SCALINGS
from jaxllm.model.spec import ACTIVATIONS, model_spec
from jaxllm.steps import STEPS
from jaxllm.train.check_adapter import check_adapter
from jaxllm.train.check_alignment import check_alignment
from jaxllm.train.check_values import check_values, value_of
from jaxllm.train.config import Config
from jaxllm.train.optimizer import check_optimizer, make_schedule

CHOICES = {
    "model.positions": ("learned", "rope", "alibi", "none"),
    "model.rope_scaling": ROPE_SCALINGS,
    "model.norm": ("layernorm", "rmsnorm"),
    "model.norm_position": ("pre", "post"),
    "model.expert_dispatch": ("dropless", "capacity"),
    "adapter.kind": KINDS,
    "adapter.base_weights": BASE_WEIGHTS,
    "adapter.init": INITS,
    "adapter.encoder": ENCODERS,
    "adapter.prompt_init": PROMPT_INITS,
    "model.activation": ("gelu", "gelu_tanh", "silu", "relu"),
    "layout.remat": ("none", "selective", "full"),
    "layout.attention": ("auto", "xla", "cudnn"),
    "layout.context_attention": ("ring", "all_gather"),
    "precision.compute": ("bfloat16", "float32", "float16"),
    "precision.params": ("float32",),
    "precision.gradients": ("float32", "bfloat16"),
    "data.packing": ("concat", "best_fit", "none"),
    "data.supervise": SUPERVISE,
    "data.truncation": TRUNCATION,
    "train.spike": ("log", "skip", "rollback"),
}
MOST_UNROLLED = 256  # layers


def check(config: Config, num_devices: int) -> None:
    """Checks `config` for training on `num_devices` devices.

    Raises:
      UserError: the first mistake found: the value, the rule and the nearest way out.
    """
    check_for_use(config, num_devices)
    _check_step(config)
    if config.train.spike == "rollback" and STEPS[config.train_step].draws:
        raise UserError(
            f"config.train.spike=rollback leaves out data that is read, and {config.train_step} writes its own. "
            "Use log or skip."
        )
    check_adapter(config)
    check_alignment(config)
    check_packing(config.data, STEPS[config.train_step].batch)
    check_optimizer(config.optimizer)
    make_schedule(config.optimizer, config.train.steps)
    layout = config.layout
    rules = make_rules(layout.rules, layout.rule_overrides, sequence_parallel=layout.sequence_parallel)
    shape = mesh_shape(config.mesh, num_devices)
    _check_length(config, rules, shape)
    _check_batch(config, rules, shape)
    _check_pipeline(config, rules, shape)
    _check_own_rules(config, rules, shape, every_row_works=True)


def check_for_use(config: Config, num_devices: int) -> None:
    """Checks what generation and evaluation need of `config`. Raises as `check`."""
    for name, choices in CHOICES.items():
        one_of(f"config.{name}", value_of(config, name), choices)
    check_values(config)
    layout = config.layout
    rules = make_rules(layout.rules, layout.rule_overrides, sequence_parallel=layout.sequence_parallel)
    shape = mesh_shape(config.mesh, num_devices)
    _check_model(config)
    _check_unrolled(config)
    _check_experts(config, rules, shape)
    _check_split(config, rules, shape)
    _check_own_rules(config, rules, shape, every_row_works=False)


def _check_experts(config: Config, rules: Rules, shape: dict[str, int]) -> None:
    model = config.model
    if not model.num_experts:
        if shape["expert"] > 1:
            raise UserError(
                f"config.mesh.expert={shape['expert']}: the model has no experts (config.model.num_experts=0). "
                "Set --config.mesh.expert=1 and give the devices to data."
            )
        return
    if model.experts_per_token > model.num_experts:
        raise UserError(
            f"config.model.experts_per_token={model.experts_per_token} is more than num_experts={model.num_experts}."
        )
    if model.expert_dispatch == "capacity" and (parts := _parts("length", rules, shape))[0] > 1:
        raise UserError(
            "config.model.expert_dispatch='capacity' counts an expert's tokens in whole rows, which "
            f"{parts[1]} splits. Use 'dropless', or give the devices to data or expert."
        )
    _check_divides("config.model.num_experts", model.num_experts, "experts", rules, shape)
    split = [axis for axis in rules.mesh_axes("experts") if shape[axis] > 1]
    if not set(split) <= set(rules.mesh_axes("batch")):
        raise UserError(
            f"layout rules split experts over {'+'.join(split)}, which must be among the mesh axes that split the "
            f"batch: {'+'.join(rules.mesh_axes('batch'))}. Use --config.layout.rule_overrides=experts=expert."
        )


def _check_model(config: Config) -> None:
    model = config.model
    if not model.head_dim and model.embed_dim % model.num_heads:
        raise UserError(
            f"config.model.embed_dim={model.embed_dim} is not divisible by num_heads={model.num_heads}. "
            f"Nearest: embed_dim={nearest_multiples(model.embed_dim, model.num_heads)}; or set config.model.head_dim."
        )
    if model.num_kv_heads and model.num_heads % model.num_kv_heads:
        raise UserError(
            f"config.model.num_heads={model.num_heads} is not divisible by num_kv_heads={model.num_kv_heads}. "
            f"Nearest: num_kv_heads={_nearest_divisors(model.num_kv_heads, model.num_heads)}."
        )
    head_dim = model.head_dim or model.embed_dim // model.num_heads
    if model.positions == "rope" and head_dim % 2:
        raise UserError(f"config.model: head_dim={head_dim} is odd, but rope turns pairs. Choose an even head_dim.")


def _check_unrolled(config: Config) -> None:
    if not config.layout.scan_layers and config.model.num_layers > MOST_UNROLLED:
        raise UserError(
            f"config.layout.scan_layers=False writes config.model.num_layers={config.model.num_layers} layers out one "
            f"after the other, at most {MOST_UNROLLED}: to compile more takes hours. Use --config.layout.scan_layers."
        )


def _check_split(config: Config, rules: Rules, shape: dict[str, int]) -> None:
    """Heads and mlp against the mesh axes that split them. The vocabulary is padded, so any size will do."""
    model = config.model
    mlp_dim = model.mlp_dim or 4 * model.embed_dim
    _check_divides("config.model.num_heads", model.num_heads, "heads", rules, shape)
    _check_divides("config.model.mlp_dim", mlp_dim, "mlp", rules, shape)
    _check_divides("config.model.embed_dim", model.embed_dim, "embed", rules, shape)
    _check_divides("config.model.embed_dim", model.embed_dim, "residual_embed", rules, shape)
    _check_kv_heads(model.num_kv_heads or model.num_heads, model.num_heads, rules, shape)


def _parts(logical: str, rules: Rules, shape: dict[str, int]) -> tuple[int, str]:
    """Into how many parts a logical axis is split, and that as a person writes it: "mesh.data=2 x mesh.model=4"."""
    axes = [axis for axis in rules.mesh_axes(logical) if shape[axis] > 1]
    return math.prod(shape[axis] for axis in axes), " x ".join(f"config.mesh.{axis}={shape[axis]}" for axis in axes)


def _check_divides(name: str, size: int, logical: str, rules: Rules, shape: dict[str, int]) -> None:
    parts, written = _parts(logical, rules, shape)
    if size % parts:
        fewer = "" if " x " in written else f"; or {written.partition('=')[0]}={math.gcd(size, parts)}"
        raise UserError(
            f"{name}={size} is not divisible by {written}, which splits {logical}. "
            f"Nearest: {name.rpartition('.')[2]}={nearest_multiples(size, parts)}{fewer}."
        )


def _check_kv_heads(size: int, num_heads: int, rules: Rules, shape: dict[str, int]) -> None:
    """Fewer key heads than parts will do where each is copied the same number of times."""
    parts, written = _parts("kv_heads", rules, shape)
    fits = [d for d in range(1, num_heads + 1) if num_heads % d == 0 and (d % parts == 0 or parts % d == 0)]
    if size not in fits:
        raise UserError(
            f"config.model.num_kv_heads={size} does not go with {written}, which splits kv_heads: one must divide the "
            f"other. Nearest: num_kv_heads={_both_sides(size, fits)}."
        )


def _check_own_rules(config: Config, rules: Rules, shape: dict[str, int], *, every_row_works: bool) -> None:
    """The user's own rules against the tensors of the model: no clash and, for training, no row in vain."""
    name, overrides = config.layout.rules, config.layout.rule_overrides
    if not is_named(name) and not overrides:
        return
    # The vocabulary is padded, so what stands in for that of a tokenizer not read yet does not matter.
    spec = model_spec(config.model.resolved(vocab_size=math.prod(shape.values())))
    mesh = AbstractMesh(tuple(shape.values()), tuple(shape))
    layout = Layout(mesh, rules, zero_stage=config.layout.zero_stage)
    over = list(parse_overrides(overrides))
    own = [logical for logical in own_rows(name) if logical not in over]
    for source, rows in {"config.layout.rule_overrides": over, f"config.layout.rules={name}": own}.items():
        check_rules(layout, spec.axes, spec.shapes, rows if every_row_works else (), ACTIVATIONS, source)


def _check_step(config: Config) -> None:
    causal = config.model.causal
    if STEPS[config.train_step].causal == causal:
        return
    fitting = " or ".join(name for name, step in STEPS.items() if step.causal == causal)
    sees = "only what comes before it" if causal else "the tokens on both sides, also the one to predict"
    raise UserError(
        f"config.train_step={config.train_step} does not go with config.model.causal={causal}: a token sees {sees}. "
        f"Use --config.train_step={fitting}, or --config.model.causal={not causal}."
    )


def _check_length(config: Config, rules: Rules, shape: dict[str, int]) -> None:
    if config.data.length > config.model.max_length:
        raise UserError(
            f"config.data.length={config.data.length} is above config.model.max_length={config.model.max_length}. "
            "Raise max_length or shorten length."
        )
    if config.data.length == 1:
        raise UserError("config.data.length=1 leaves nothing to predict: 2 or more, or 0 for config.model.max_length.")
    length = config.data.length or config.model.max_length
    parts, written = _parts("length", rules, shape)
    between_blocks, _ = _parts("residual_length", rules, shape)
    if parts > 1 and length % (2 * parts):
        nearest = nearest_multiples(length, math.lcm(2 * parts, between_blocks))
        raise UserError(
            f"config.data.length={length} is not divisible by 2 x {written}: each part of a sequence is an early chunk "
            f"and a late one. Nearest: length={nearest}."
        )
    _check_divides("config.data.length", length, "residual_length", rules, shape)
    # The rest of what keeps a backend from running hangs on the devices: model/attention_check.py.
    choose_backend(config.layout.attention, "gpu", compute="bfloat16", dropout=0.0, context=parts)


def _check_batch(config: Config, rules: Rules, shape: dict[str, int]) -> None:
    parts, written = _parts("batch", rules, shape)
    microbatches, size = config.layout.num_microbatches, config.data.batch_size
    if size % (parts * microbatches):
        factors = [written] * (parts > 1) + [f"config.layout.num_microbatches={microbatches}"] * (microbatches > 1)
        raise UserError(
            f"config.data.batch_size={size} is not divisible by {' x '.join(factors)}. "
            f"Nearest: batch_size={nearest_multiples(size, parts * microbatches)}."
        )


def _check_pipeline(config: Config, rules: Rules, shape: dict[str, int]) -> None:
    """The layers against the stages, and the schedule against the microbatches: the table is made, and proved."""
    layout, num_stages = config.layout, shape["pipeline"]
    schedules.check_name(layout.schedule)
    if num_stages == 1:
        return
    if rules.mesh_axes("layers") != ("pipeline",):
        raise UserError(
            f"config.mesh.pipeline={num_stages}, but the rules do not split layers over pipeline alone. "
            "Set --config.mesh.pipeline=1, or leave the row 'layers' as it is."
        )
    for logical in LOGICAL_AXES:
        row = rules.mesh_axes(logical)
        if "pipeline" in row and logical not in ("layers", "state"):
            raise UserError(
                f"layout rule '{logical}={'+'.join(row)}': config.mesh.pipeline={num_stages} deals the layers to "
                f"stages, and each stage has to have all of the axis {logical}. Leave 'pipeline' out of the row."
            )
    schedules.make_schedule(layout.schedule, num_stages, layout.num_microbatches, layout.virtual_stages)
    make_stages(config.model.num_layers, num_stages, layout.virtual_stages, layout.stage_layers)


def nearest_multiples(size: int, factor: int) -> str:
    """The multiples of `factor` on both sides of `size`, as "96 or 128"."""
    below = size // factor * factor
    return f"{below} or {below + factor}" if below else str(factor)


def _nearest_divisors(size: int, whole: int) -> str:
    return _both_sides(size, [d for d in range(1, whole + 1) if whole % d == 0])


def _both_sides(size: int, choices: list[int]) -> str:
    """The choices next to `size`, as "2 or 4"."""
    below = max((d for d in choices if d <= size), default=None)
    above = min((d for d in choices if d > size), default=None)
    return " or ".join(str(d) for d in (below, above) if d)
