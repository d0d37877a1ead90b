"""Ray actors around vLLM's ``AsyncLLM``, their lifecycle, and the plugin inside vLLM's processes."""
