"""Worker extension of test engines (vLLM 0.32.0) whose weights a test damages."""

from __future__ import annotations

import torch

from rollout_server.drafter.proposer import SelfDraftProposer
from rollout_server.engine.vllm_plugin.worker_extension import SlipstreamWorkerExtension


class DamagingExtension(SlipstreamWorkerExtension):
    """Lets a test flip what an engine computes with."""

    def damage(self, module_name: str, in_drafter: bool) -> None:
        if in_drafter:
            assert SelfDraftProposer.active is not None
            module = SelfDraftProposer.active.model.get_submodule(module_name)
            packed = module.quant_method.packed_tensors()[0]
            packed.view(torch.uint8).view(-1)[7] ^= 1
            return
        module = self.model_runner.get_model().get_submodule(module_name)
        parameter = module.weight
        if parameter.numel():
            parameter.data.view(-1)[3] += 1
            return
        packed = module.cpu_linear  # packed away: damage what it gives back
        module.cpu_linear = lambda x, weight, bias: packed(x, weight, bias) + 2**-10
