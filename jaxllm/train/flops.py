"""Model FLOP utilisation (MFU): the FLOPs a token needs, and what each kind of device can do."""

import re
from collections.abc import Mapping

import jax

from jaxllm.model.spec import ModelSpec

# Dense bfloat16 TFLOP/s (no sparsity) by words of `jax.Device.device_kind`; the first match counts. None: a name that
# begins like another.
PEAK_TFLOPS: Mapping[str, float | None] = {
    "GB300": 2500,  # NVIDIA GB300 NVL72 page, half of the sparse figure
    "B300": 2250,  # NVIDIA HGX B300 page, half of the sparse figure
    "GB200": 2500,  # NVIDIA GB200 NVL72 data sheet: 360 PFLOP/s sparse / 72 / 2
    "B200": 2250,  # NVIDIA HGX B200 data sheet: 36 PFLOP/s sparse / 8 / 2
    "GH200": 989,  # NVIDIA GH200 data sheet, half of the sparse figure
    "H200 NVL": 835,  # NVIDIA H200 data sheet: 1,671 sparse / 2
    "H200": 989,  # NVIDIA H200 data sheet: 1,979 sparse / 2
    "H100 NVL": 835,  # NVIDIA H100 data sheet: 1,671 sparse / 2
    "H100 PCIe": 756,  # NVIDIA H100 PCIe data sheet: 1,513 sparse / 2
    "H100": 989,  # SXM; NVIDIA H100 data sheet: 1,979 sparse / 2
    "A100": 312,  # NVIDIA A100 data sheet
    "A800": 312,  # an A100 with slower links
    "H800": 989,  # an H100 SXM with slower links
    "L40S": 362,  # NVIDIA L40S data sheet: 362.05
    "L40": 181,  # NVIDIA L40 data sheet: 181.05
    "L4": 121,  # NVIDIA L4 data sheet: 242 sparse / 2
    "A10G": 70,  # Amazon EC2 G5 page
    "A10": 125,  # NVIDIA A10 data sheet
    "RTX 4090 Laptop": None,
    "RTX 4090 D": None,
    "RTX 4090": 165.2,  # NVIDIA Ada GPU architecture white paper, appendix A: bfloat16 with float32 accumulation
    "TPU v4 lite": None,
    "TPU v4": 275,  # Google Cloud TPU v4 page
    "TPU v5 lite": 197,  # v5e as JAX names it; Google Cloud TPU v5e page
    "TPU v5e": 197,
    "TPU v5": 459,  # v5p as JAX names it; Google Cloud TPU v5p page
    "TPU v5p": 459,
    "TPU v6 lite": 918,  # v6e as JAX names it; Google Cloud TPU v6e page
    "TPU v6e": 918,
}


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s of a device, or None where the table does not know it (CPUs)."""
    named = (peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device.device_kind))
    peak = next(named, None)
    return peak and peak * 1e12


def flops_per_token(spec: ModelSpec, length: int) -> float:
    """Floating-point operations of forward and backward pass a token: 6 N + 12 * layers * heads * head_dim * length.

    The convention of PaLM (Chowdhery et al. 2022, appendix B): full attention, nothing for recomputation. N counts the
    parameters that multiply: tables that are only looked up (positions, and the embedding where the head is not tied
    to it) count nothing; a tied table counts once, as the head; of experts only those that a token is sent to. Frozen
    parameters multiply twice, not three times: they have no gradient.

    Args:
      length: tokens of a training sequence.
    """
    multiplying = spec.num_active_parameters - spec.num_embedding_parameters
    config = spec.config
    weights = 4.0 * multiplying + 2.0 * spec.num_trained_parameters if spec.is_adapted else 6.0 * multiplying
    return weights + 12.0 * config.num_layers * config.num_heads * config.head_dim * length
