"""Main module of vLLM's processes below an engine's actor (``quick_start.spawning_lightly``).

``vllm_plugin.register``, which runs when they have imported vLLM, ends what begins here.
"""

from rollout_server.engine.quick_start import collect_rarely

collect_rarely()
