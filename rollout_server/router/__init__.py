"""Which engine serves a prompt: choose -> reserve -> dispatch -> release.

``strategy`` decides (pure), ``router`` does.
"""
