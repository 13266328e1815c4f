"""TRL's loss functions on given numbers: its trainers' methods with a stand-in for the trainer."""

import inspect
import os
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.steps.trl_source import Source

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
torch = pytest.importorskip("torch", reason="parity with TRL needs the extra hf")
pytest.importorskip("trl", reason="parity with TRL needs the extra hf")


def tensor(x: np.ndarray, *, grad: bool = False):
    return torch.tensor(np.asarray(x), requires_grad=grad)


class _Accelerator:
    """One process."""

    device, num_processes, sync_gradients = torch.device("cpu"), 1, True

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x

    def unwrap_model(self, model):
        return model


def trainer(**fields) -> SimpleNamespace:
    """Stands for a trainer outside of training."""
    metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    model = SimpleNamespace(training=False)
    return SimpleNamespace(accelerator=_Accelerator(), model=model, _metrics=metrics, aux_loss_enabled=False, **fields)


def value_and_gradients(loss, *variables) -> tuple[float, list[np.ndarray]]:
    loss.backward()
    return float(loss.detach()), [variable.grad.numpy() for variable in variables]


def dpo(kind: str, token_log_probs, mask, reference_chosen, reference_rejected, *, beta: float, smoothing: float):
    """(mean loss, its gradient by token log-probability), of rows with the chosen first, then the rejected.

    `token_log_probs` and `mask` are [2 pairs, length], 0 outside the mask.
    """
    from trl import DPOTrainer

    log_p, mask = tensor(token_log_probs, grad=True), tensor(mask.astype(np.int64))
    zeros = torch.zeros_like(log_p.detach())
    outputs = SimpleNamespace(log_probs=log_p, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    before = torch.zeros_like(mask[:, :1])
    inputs = {
        "input_ids": torch.zeros(mask.shape[0], mask.shape[1] + 1, dtype=torch.int64),
        "attention_mask": torch.ones(mask.shape[0], mask.shape[1] + 1),
        "completion_mask": torch.cat([before, mask], dim=1),
        "ref_chosen_logps": tensor(reference_chosen),
        "ref_rejected_logps": tensor(reference_rejected),
    }
    stub = trainer(
        beta=beta,
        label_smoothing=smoothing,
        loss_types=[kind],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        ld_alpha=None,
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss = DPOTrainer._compute_loss(stub, lambda **_: outputs, inputs, False)
    return value_and_gradients(loss, log_p)


def cpo(kind: str, chosen, rejected, *, beta: float, margin: float = 0.0, smoothing: float = 0.0):
    """(mean loss, gradients): simpo of mean log-probabilities a token; of gains on a reference cDPO and IPO of sums."""
    from trl.experimental.cpo import CPOTrainer

    variables = tensor(chosen, grad=True), tensor(rejected, grad=True)
    stub = trainer(alpha=0.0, loss_type=kind, simpo_gamma=margin, beta=beta, label_smoothing=smoothing)
    return value_and_gradients(CPOTrainer.cpo_loss(stub, *variables)[0].mean(), *variables)


def orpo(chosen, rejected, *, weight: float):
    """(mean loss, gradients): the chosen's negative log-probability, and the odds ratio as the trainer takes it."""
    from trl.experimental.orpo import ORPOTrainer

    variables = tensor(chosen, grad=True), tensor(rejected, grad=True)
    ratio = ORPOTrainer.odds_ratio_loss(trainer(beta=weight), *variables)[0]
    return value_and_gradients((-variables[0] - ratio).mean(), *variables)


def reward(chosen, rejected, margins, *, centring: float):
    """(mean loss, gradients), of scores."""
    from trl import RewardTrainer

    variables = tensor(chosen, grad=True), tensor(rejected, grad=True)
    outputs = SimpleNamespace(logits=torch.cat(variables)[:, None])
    stub = trainer(args=SimpleNamespace(center_rewards_coefficient=centring or None), _total_train_tokens=0, _tp_size=1)
    inputs = {"margin": tensor(margins), "attention_mask": torch.ones(1)}
    model = lambda **_: outputs  # noqa: E731
    return value_and_gradients(RewardTrainer.compute_loss(stub, model, inputs), *variables)


def grpo_source() -> Source:
    from trl.trainer import grpo_trainer

    return Source(Path(inspect.getfile(grpo_trainer)), torch=torch, nanstd=grpo_trainer.nanstd)


def grpo(kind: str, log_p, old, reference, advantages, mask, *, max_length: int, options):
    """(loss, its gradient by log-probability)."""
    from trl import GRPOTrainer

    variable = tensor(log_p, grad=True)
    stub = trainer(
        _get_per_token_logps_and_entropies=lambda *_, **__: (variable, torch.zeros_like(variable.detach()), None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=options.kl_weight,
        loss_type=kind,
        epsilon_low=options.clip_low,
        epsilon_high=options.clip_high,
        use_vllm=False,
        max_completion_length=max_length,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=options.dual_clip or None, use_bias_correction_kl=False, steps_per_generation=1),
    )
    integers = tensor(mask.astype(np.int64))
    inputs = {
        "prompt_ids": integers[:, :0],
        "prompt_mask": integers[:, :0],
        "completion_ids": integers,
        "completion_mask": integers,
        "advantages": tensor(advantages),
        "old_per_token_logps": tensor(old),
        "ref_per_token_logps": tensor(reference),
        "num_items_in_batch": integers.sum(),
    }
    return value_and_gradients(GRPOTrainer._compute_loss(stub, None, inputs), variable)
