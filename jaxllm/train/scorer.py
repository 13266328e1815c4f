"""Models with a scalar head that another run is made with: a reward model that judges, or the start of a critic."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from jaxllm.data.tokenizer import Tokenizer, load_tokenizer
from jaxllm.errors import UserError
from jaxllm.layout.layout import Layout
from jaxllm.layout.scope import like
from jaxllm.model.actor_critic import ActorCritic
from jaxllm.model.config import differing
from jaxllm.model.spec import ModelSpec, model_spec
from jaxllm.remote.copy import local_copy
from jaxllm.train.checkpoint.checkpoints import Checkpoints
from jaxllm.train.config import Config, read_config
from jaxllm.train.initial import newest_identity
from jaxllm.train.initial_adapter import FREE
from jaxllm.train.state import Params, spread


class Scorer(NamedTuple):
    """A model with a scalar head as a run left it."""

    config: Config
    spec: ModelSpec
    own: Params  # its parameters, of an adapter its own alone; float32, spread as a state is
    base_hash: str  # of the parameters that an adapter is for; "" of a whole model


def check_scorer(field: str, workdir: str, tokenizer: Tokenizer) -> Config:
    """The config of the run in `workdir`, which config.`field` names; refuses one that does not score texts.

    Raises:
      UserError: no run, one without a scalar head, or with another tokenizer.
    """
    with Checkpoints(local_copy(workdir) / "checkpoints") as checkpoints:
        stored = checkpoints.newest_run()
    if stored is None:
        raise UserError(f"config.{field}={workdir}: there is no checkpoint in it.")
    config = read_config(stored["config"])
    if not config.model.scalar_head:
        raise UserError(
            f"config.{field}={workdir} is a run of train_step={config.train_step}, which gives texts no score. "
            "Give one of train_step=reward (configs/reward.py)."
        )
    folder = local_copy(workdir) / "tokenizer"
    if load_tokenizer(folder).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"config.{field}={workdir} was trained with another tokenizer than config.data.tokenizer. A model that "
            f"judges must read the same tokens: --config.data.tokenizer={folder}."
        )
    return config


def restore_scorer(workdir: str, layout: Layout, tokenizer: Tokenizer, say: Callable[[str], None]) -> Scorer:
    """The newest parameters of the run in `workdir`, which `check_scorer` has found good, under `layout`."""
    with Checkpoints(local_copy(workdir) / "checkpoints", say=say) as checkpoints:
        stored = checkpoints.newest_run()
        assert stored is not None, "check_scorer found a checkpoint"
        config = read_config(stored["config"])
        spec = model_spec(config.model.resolved(tokenizer.vocab_size), config.adapter)
        restored = checkpoints.restore_params(spread(spec.own(spec.shapes), spec.own(spec.axes), layout))
    assert restored is not None
    step, own, run = restored
    say(f"scores of {workdir}, step {step}, parameter hash {run['parameter_hash']}")
    return Scorer(config, spec, own, run["base"].get("parameter_hash", ""))


def check_critic(config: Config, spec: ModelSpec, tokenizer: Tokenizer) -> None:
    """Refuses a `config.ppo.critic_init_from` that the critic of this run cannot start from.

    Raises:
      UserError: as `check_scorer`; another model, another adapter, or an adapter for other parameters.
    """
    source = config.ppo.critic_init_from
    if not source or not isinstance(spec, ActorCritic):
        return
    theirs = check_scorer("ppo.critic_init_from", source, tokenizer)
    model = dataclasses.replace(theirs.model.resolved(tokenizer.vocab_size), tied_head=spec.critic.config.tied_head)
    lines = [f"config.model.{n}: {a!r} there, {b!r} here" for n, (a, b) in differing(model, spec.critic.config).items()]
    there, here = dataclasses.asdict(theirs.adapter), dataclasses.asdict(config.adapter)
    differ = [name for name in there if name not in FREE and there[name] != here[name]]
    lines += [f"config.adapter.{name}: {there[name]!r} there, {here[name]!r} here" for name in differ]
    if lines:
        raise UserError(
            f"config.ppo.critic_init_from={source} is no start for this run's critic: " + "; ".join(lines[:3]) + ".\n"
            "Leave it empty: then the critic starts as the actor does."
        )
    if spec.is_adapted:
        with Checkpoints(local_copy(source) / "checkpoints") as checkpoints:
            wanted = (checkpoints.newest_run() or {})["base"]["parameter_hash"]
        if wanted != newest_identity(local_copy(config.train.init_from))["parameter_hash"]:
            raise UserError(
                f"config.ppo.critic_init_from={source} is an adapter for the parameters with hash {wanted}, which are "
                f"not those of config.train.init_from={config.train.init_from}. An adapter fits no other model."
            )


def restore_critic(
    config: Config, spec: ModelSpec, layout: Layout, tokenizer: Tokenizer, say: Callable[[str], None]
) -> Params | None:
    """The critic's own parameters at the start of a run; None where it starts as the actor does."""
    if not isinstance(spec, ActorCritic) or not config.ppo.critic_init_from:
        return None
    scorer = restore_scorer(config.ppo.critic_init_from, layout, tokenizer, say)
    return like(scorer.own, spec.critic.own(spec.critic.shapes))
