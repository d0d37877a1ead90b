"""The drafter: a quantized copy of the served policy that shares its KV cache.

``schemes.py`` quantizes (pure torch), ``kernels/`` multiplies (vLLM's kernels),
``quantization.py`` makes vLLM build a model out of them, ``sharing.py`` gives it the target's own
tensors and KV cache, ``proposer.py`` drafts, ``requantization.py`` rebuilds it after a push.
"""
