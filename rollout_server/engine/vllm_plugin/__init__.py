"""Entry point of the vLLM plugin (group ``vllm.general_plugins``): runs in every vLLM process.

What it changes in vLLM 0.32.0, all of it here:

- ``vllm.v1.worker.gpu_model_runner.DraftModelProposer`` becomes ``SelfDraftProposer``
  (``CPUModelRunner`` inherits from that runner);
- ``vllm.v1.engine.core.EngineCore`` gains the methods in ``core_methods.py``;
- steps without drafts run as without speculation (``plain_steps.py``);
- steps with drafts verify them our way (``speculative_steps.py``);
- min-p and logit bias work under speculation (``sampling_parameters.py``);
- logprobs come without the texts of single tokens, which nobody reads (``bare_logprobs.py``);
- on CPU, AMX is asked for (``amx_permission.py``), one kernel is repaired (``kernel_repair.py``),
  and so are seeded requests whose prompt is prefilled in pieces (``seeded_prefill.py``), token
  embeddings are packed only where something multiplies with them (``embeddings.py``), and processes
  that wait for each other sleep (``sleeping_waits.py``);
- vLLM's processes end when they have shut down (``quick_exit.py``);
- on CUDA, the target has full graphs for every draft length and the drafter for whole loops
  (``full_graphs.py``).

The scheduler and the worker extension are given to vLLM by name in its own arguments.
"""

from __future__ import annotations

import os

from rollout_server.engine.quick_start import collect_as_usual

DISABLE_VARIABLE = "SLIPSTREAM_VLLM_PLUGIN"
"""Set to ``0`` to leave vLLM as it is (used by tests and by benchmarks of plain vLLM)."""


def register() -> None:
    """Check vLLM, then patch it. Idempotent.

    Raises:
        RuntimeError: this vLLM is not the one the plugin was written for.
    """
    collect_as_usual()  # what is large is imported
    if os.environ.get(DISABLE_VARIABLE) == "0":
        return
    import vllm
    from vllm.platforms import current_platform
    from vllm.v1.engine.core import EngineCore

    from rollout_server.engine.vllm_plugin.compatibility import (
        CPU_SYMBOLS,
        CUDA_SYMBOLS,
        REQUIRED_SYMBOLS,
        check_compatibility,
    )
    from rollout_server.engine.vllm_plugin.core_methods import CORE_METHODS

    if hasattr(EngineCore, CORE_METHODS[0].__name__):
        return  # patched already: plugins may be loaded more than once in a process

    is_cpu = current_platform.is_cpu()
    if not is_cpu:
        check_compatibility(vllm.__version__, REQUIRED_SYMBOLS + CUDA_SYMBOLS)
    else:
        check_compatibility(vllm.__version__, REQUIRED_SYMBOLS + CPU_SYMBOLS)
        from rollout_server.engine.vllm_plugin.amx_permission import ask_for_amx
        from rollout_server.engine.vllm_plugin.kernel_repair import apply_kernel_repair

        ask_for_amx()
        apply_kernel_repair()

    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.executor.multiproc_executor import WorkerProc
    from vllm.v1.worker import gpu_model_runner

    from rollout_server.drafter.proposer import SelfDraftProposer
    from rollout_server.engine.vllm_plugin import plain_steps as plain
    from rollout_server.engine.vllm_plugin import quick_exit
    from rollout_server.engine.vllm_plugin import sampling_parameters as parameters
    from rollout_server.engine.vllm_plugin import speculative_steps as speculative
    from rollout_server.engine.vllm_plugin.bare_logprobs import without_token_texts

    gpu_model_runner.DraftModelProposer = SelfDraftProposer
    if not is_cpu:
        from rollout_server.engine.vllm_plugin.full_graphs import apply_cuda_patches

        apply_cuda_patches()
    EngineCore.shutdown = quick_exit.exit_after_clean_stop(EngineCore.shutdown)
    WorkerProc.shutdown = quick_exit.exit_after(WorkerProc.shutdown)
    for method in CORE_METHODS:
        setattr(EngineCore, method.__name__, method)
    EngineCore.post_step = speculative.drafts_came_with_output(EngineCore.post_step)
    runner = gpu_model_runner.GPUModelRunner
    runner._input_fits_in_drafter = speculative.draft_to_the_end_of_the_context
    runner._sample = speculative.verify_drafts(runner._sample)
    runner.propose_draft_token_ids = speculative.tell_drafter_what_was_sampled(
        runner.propose_draft_token_ids
    )
    runner.sample_tokens = plain.run_idle_steps_plainly(
        speculative.send_drafts_with_output(runner.sample_tokens)
    )
    runner.execute_model = plain.run_idle_steps_plainly(runner.execute_model)
    LogprobsProcessor.from_new_request = without_token_texts(LogprobsProcessor.from_new_request)
    if is_cpu:
        from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

        from rollout_server.engine.vllm_plugin import seeded_prefill, sleeping_waits
        from rollout_server.engine.vllm_plugin.embeddings import pack_when_used

        UnquantizedEmbeddingMethod.process_weights_after_loading = pack_when_used(
            UnquantizedEmbeddingMethod.process_weights_after_loading
        )

        SpinCondition.wait = sleeping_waits.nap_instead_of_spinning(SpinCondition.wait)
        SpinCondition.notify = sleeping_waits.notify_in_any_case(SpinCondition.notify)
        runner.sample_tokens = seeded_prefill.sample_unfinished_prompts_without_seed(
            runner.sample_tokens
        )
    SamplingParams._validate_spec_decode = parameters.allow_under_speculation(
        SamplingParams._validate_spec_decode
    )
    gpu_model_runner.build_logitsprocs = parameters.keep_every_processor(
        gpu_model_runner.build_logitsprocs
    )
