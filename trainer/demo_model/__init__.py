"""Makes small Qwen3 models with their own tokenizer, for demos, tests and benchmarks.

``trainer.demo_model.build.make_model`` and ``python -m trainer.demo_model`` are the ways in.
Nothing is imported here: torch takes seconds, and ``--help`` must not.
"""
