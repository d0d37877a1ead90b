"""The name under which drafts travel from a worker to the scheduler. Imports nothing."""

DRAFTS_ATTRIBUTE = "slipstream_draft_token_ids"
"""On vLLM's ``ModelRunnerOutput``: the ``DraftTokenIds`` made at the end of the step."""
