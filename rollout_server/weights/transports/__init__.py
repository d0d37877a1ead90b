"""How a pushed segment reaches the server, and a verified one every engine's machine."""
