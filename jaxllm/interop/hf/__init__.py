"""Models in Hugging Face directories: config.json and safetensors files, both ways."""
