"""All train steps by the name that `config.train_step` gives them."""

from jaxllm.steps import dpo, grpo, lora, mlm, ppo, pretrain, prompt, reward, sft
from jaxllm.steps.step import TrainStep

STEPS: dict[str, TrainStep] = {
    "pretrain": pretrain.step,
    "mlm": mlm.step,
    "sft": sft.step,
    "lora": lora.step,
    "prompt": prompt.step,
    "reward": reward.step,
    "dpo": dpo.step,
    "ppo": ppo.step,
    "grpo": grpo.step,
}
