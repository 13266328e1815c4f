"""Fine-tuning by LoRA: what sft learns, in narrow matrices beside frozen ones (Hu et al. 2021; model/adapters.py)."""

from jaxllm.data.batch import EXAMPLES
from jaxllm.steps import sft
from jaxllm.steps.step import TrainStep

step = TrainStep(sft.loss, batch=EXAMPLES, adapters=("lora",))
