"""Rollout requests from acceptance to result: prepare, generate, score, keep.

``registry`` owns the running executions (idempotency) and the ``result_store`` of ended ones; an
``execution`` runs one request whoever is listening; ``prompts`` and ``groups`` are pure.
"""
