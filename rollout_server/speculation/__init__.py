"""When to draft, and how much: a pure controller, and the vLLM scheduler that asks it."""
