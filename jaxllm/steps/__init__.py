"""Train steps: a step is a loss and what it trains, one file each."""

from jaxllm.steps import lora, mlm, pretrain, prompt, sft
from jaxllm.steps.step import TrainStep

STEPS: dict[str, TrainStep] = {
    "pretrain": pretrain.step,
    "mlm": mlm.step,
    "sft": sft.step,
    "lora": lora.step,
    "prompt": prompt.step,
}
