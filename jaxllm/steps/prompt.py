"""Fine-tuning by prompts: what sft learns, in virtual tokens or prefixes before frozen text (model/prompts.py)."""

from jaxllm.data.batch import EXAMPLES
from jaxllm.model.adapter_config import PROMPTS
from jaxllm.steps import sft
from jaxllm.steps.step import TrainStep

step = TrainStep(sft.loss, batch=EXAMPLES, adapters=PROMPTS)
