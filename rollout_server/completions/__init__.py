"""OpenAI-compatible completions over the same router: ``job`` and ``bodies`` are pure, ``runner``
generates."""
