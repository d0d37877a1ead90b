"""Which engine serves a prompt: choose -> reserve -> dispatch -> release.

``strategy`` decides (pure), ``router`` does; ``circuit_breaker`` says which engines to avoid and
``stragglers`` which groups are late.
"""
