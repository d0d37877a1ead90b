"""Rollout requests from acceptance to result: prepare, generate, score, record, keep.

``registry`` owns the running executions (idempotency) and the ``result_store`` of ended ones; an
``execution`` runs one request whoever is listening; ``prompts`` and ``groups`` are pure. The
``ledger`` has what outlives the process, and ``restoring`` makes requests of it again.
"""
