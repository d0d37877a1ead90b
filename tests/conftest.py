"""For every test."""

from __future__ import annotations

import signal

from hypothesis import settings

# A shell that starts the tests in the background has them ignore SIGINT, and so would every child:
# with a handler here, children get the default back.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says something of the machine's other work, nothing of the code.
settings.register_profile("slipstream", deadline=None)
settings.load_profile("slipstream")
