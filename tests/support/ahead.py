"""Worker extension of test engines (vLLM 0.32.0) that tells what is loaded ahead of a pause."""

from __future__ import annotations

import gc
import weakref

from rollout_server.engine.vllm_plugin.worker_extension import SlipstreamWorkerExtension


class AheadExtension(SlipstreamWorkerExtension):
    """Lets a test look, and lets vLLM fail in the middle."""

    def hold_weakly(self) -> None:
        """Without keeping it alive."""
        assert self._slipstream_ahead is not None
        self._held = weakref.ref(self._slipstream_ahead)
        gc.disable()

    def is_let_go(self) -> bool:
        """Whether what was held is gone, though nobody has collected cycles."""
        gc.enable()
        return self._held() is None

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
