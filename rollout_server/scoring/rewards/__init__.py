"""The rewards that come with the service: pure functions of text, exact and deterministic."""
