"""The contract between the rollout service, the trainer and whoever calls them.

Imports pydantic, numpy, xxhash and the standard library only, with httpx and msgpack in ``client``
and what commands need in ``cli``: never torch, ray, vllm or fastapi
(``tests/unit/test_dependency_rules.py`` enforces it).
"""

__version__ = "0.1.0"
