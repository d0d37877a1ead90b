"""The ``slipstream`` command: starts the services as child processes, talks to them over HTTP."""
