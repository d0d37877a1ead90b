"""Ray actors around vLLM's ``AsyncLLM``, their lifecycle, the plugin in vLLM's processes."""
