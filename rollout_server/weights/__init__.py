"""From a published safetensors segment to every engine serving it: verify, stage, commit."""
