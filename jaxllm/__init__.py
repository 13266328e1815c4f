"""jaxllm: train large language models in JAX on any layout of devices."""
