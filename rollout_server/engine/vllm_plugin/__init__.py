"""Entry point of the vLLM plugin (``vllm.general_plugins``). Imports vLLM lazily."""


def register() -> None:
    """Called by vLLM in every one of its processes before anything is built."""
