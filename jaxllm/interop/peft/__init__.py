"""Adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors, both ways."""
