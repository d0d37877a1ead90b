"""Worker extension of test engines (vLLM 0.32.0) that tells what is loaded ahead of a pause."""

from __future__ import annotations

from rollout_server.engine.vllm_plugin.worker_extension import SlipstreamWorkerExtension


class AheadExtension(SlipstreamWorkerExtension):
    """Lets a test look, and lets vLLM fail in the middle."""

    def ready_modules(self) -> list[str]:
        ahead = self._slipstream_ahead
        return [] if ahead is None else [part.name for part, _ in ahead._ready]

    def fail_at(self, module_name: str) -> None:
        """This module cannot be packed, once."""
        module = self.model_runner.get_model().get_submodule(module_name)
        method = module.quant_method
        process = method.process_weights_after_loading

        def fail(layer: object) -> None:
            if layer is module:
                method.process_weights_after_loading = process
                raise RuntimeError("no memory for packing")
            process(layer)

        method.process_weights_after_loading = fail
