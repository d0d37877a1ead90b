"""The HTTP edge: FastAPI routes by plane, over ``RolloutService``. Nothing here decides anything.

Callers are checked in ``access``, bodies read and validated in ``bodies``, limits checked in
``limits``, errors mapped once in ``errors``; ``middleware`` carries request ids, metrics and the
limit on body size.
"""
