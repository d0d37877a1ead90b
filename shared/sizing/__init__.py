"""How much memory an engine, a push and a trainer take: arithmetic over a model's shape. Pure."""
