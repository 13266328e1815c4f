"""Train steps: a step is a loss and what it trains, one file each."""

from jaxllm.steps import mlm, pretrain, sft
from jaxllm.steps.step import TrainStep

STEPS: dict[str, TrainStep] = {"pretrain": pretrain.step, "mlm": mlm.step, "sft": sft.step}
