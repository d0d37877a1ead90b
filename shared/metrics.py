"""Names of the Prometheus metrics, one constant each, for the server, its tests and dashboards.

Counters are named here as Prometheus exposes them, with ``_total``. Label names are in
``*_LABELS``.
"""

from typing import Final

PREFIX: Final = "slipstream_"

BUILD_INFO: Final = PREFIX + "build_info"
BUILD_INFO_LABELS: Final = ("version", "model")
"""Always 1."""

HTTP_REQUESTS: Final = PREFIX + "http_requests_total"
HTTP_REQUESTS_LABELS: Final = ("method", "route", "status")
HTTP_LATENCY: Final = PREFIX + "http_request_duration_seconds"
HTTP_LATENCY_LABELS: Final = ("method", "route")
HTTP_IN_PROGRESS: Final = PREFIX + "http_requests_in_progress"
ERRORS: Final = PREFIX + "errors_total"
"""Errors told to clients, by the ``code`` of their body; those inside streams too."""
ERRORS_LABELS: Final = ("code",)

PENDING_SAMPLES: Final = PREFIX + "pending_samples"
"""Accepted and not delivered, failed or cancelled."""
QUEUED_SAMPLES: Final = PREFIX + "queued_samples"
"""Pending and waiting in the router for an engine."""
PENDING_SAMPLES_LIMIT: Final = PREFIX + "pending_samples_limit"
"""``server.limits.max_pending_samples``: above it requests answer 429."""
LONGEST_WAIT: Final = PREFIX + "queue_longest_wait_seconds"
"""Of the group at the head of the router's queue; 0 when none waits."""
QUEUE_TIME: Final = PREFIX + "queue_time_seconds"
"""Histogram of a group's wait in the router, up to the engine that finished it."""
TIME_TO_FIRST_TOKEN: Final = PREFIX + "time_to_first_token_seconds"
"""Histogram, from acceptance, by the sample of a group that finished last."""
TIME_PER_OUTPUT_TOKEN: Final = PREFIX + "time_per_output_token_seconds"
"""Histogram of the mean seconds between the tokens of that sample."""
GENERATE_TIME: Final = PREFIX + "generate_duration_seconds"
"""Histogram of a group's seconds on the engine that finished it."""
GROUP_TIME: Final = PREFIX + "group_duration_seconds"
"""Histogram of a rollout group's seconds from acceptance to its scores."""
SAMPLES_ACCEPTED: Final = PREFIX + "samples_accepted_total"
SAMPLES_DELIVERED: Final = PREFIX + "samples_delivered_total"
SAMPLES_FAILED: Final = PREFIX + "samples_failed_total"
SAMPLES_CANCELLED: Final = PREFIX + "samples_cancelled_total"
SAMPLES_UNACCOUNTED: Final = PREFIX + "samples_unaccounted"
"""Accepted and neither ended nor pending: always 0."""
PROMPT_TOKENS: Final = PREFIX + "prompt_tokens_total"
COMPLETION_TOKENS: Final = PREFIX + "completion_tokens_total"
DRAFT_TOKENS: Final = PREFIX + "draft_tokens_total"
ACCEPTED_TOKENS: Final = PREFIX + "accepted_tokens_total"
KEPT_TOKENS: Final = PREFIX + "kept_tokens_total"
GENERATE_RETRIES: Final = PREFIX + "generate_retries_total"
"""Groups generated afresh because the engine that held them died, or failed a probe."""
STRAGGLERS_HANDED_OVER: Final = PREFIX + "straggler_handovers_total"
"""Samples of late groups that went on on another engine."""
STRAGGLER_RECOMPUTED: Final = PREFIX + "straggler_recomputed_tokens_total"
"""Prompts and tokens that other engines had to prefill for them: all that it costs."""

LEDGER_BYTES: Final = PREFIX + "ledger_bytes"
"""Of the file that accepted requests and finished groups are recorded in, and its log."""
LEDGER_UNWRITTEN: Final = PREFIX + "ledger_unwritten_changes"
"""Waiting for the disk; those that could not be written stay and are tried again."""
LEDGER_COMMITS: Final = PREFIX + "ledger_commits_total"
LEDGER_COMMIT_SECONDS: Final = PREFIX + "ledger_commit_seconds_total"
LEDGER_WRITE_FAILURES: Final = PREFIX + "ledger_write_failures_total"
"""Attempts; while there are any, new rollout requests answer 503."""

REWARDS: Final = PREFIX + "rewards_total"
REWARDS_LABELS: Final = ("status",)
SCORING_TIME: Final = PREFIX + "scoring_duration_seconds"
"""Histogram of seconds in a reward worker, waiting for it left out."""
SCORING_QUEUED: Final = PREFIX + "scoring_queued_samples"
SCORING_RESTARTS: Final = PREFIX + "scoring_worker_restarts_total"
"""Workers replaced because they were late or had crashed."""

COMMITTED_VERSION: Final = PREFIX + "committed_weight_version"
PUSHES: Final = PREFIX + "weight_pushes_total"
PUSHES_LABELS: Final = ("outcome",)
"""``committed``, ``refused``, or ``replayed``: committed already and answered again."""
PUSH_REFUSALS: Final = PREFIX + "weight_push_refusals_total"
PUSH_REFUSALS_LABELS: Final = ("reason",)
"""The error's code."""
PUSH_DURATION: Final = PREFIX + "weight_push_duration_seconds"
PUSH_PHASE_DURATION: Final = PREFIX + "weight_push_phase_duration_seconds"
PUSH_PHASE_LABELS: Final = ("phase",)
PUSH_PAUSE: Final = PREFIX + "weight_push_pause_seconds"
"""Histogram of the time an engine stood still for a committed push."""
PUSH_BYTES: Final = PREFIX + "weight_push_bytes_total"
PUSH_BYTES_LABELS: Final = ("encoding",)
"""Of committed pushes. ``full`` carries every tensor whole."""
PUSH_ENGINES_REMOVED: Final = PREFIX + "weight_push_engines_removed_total"
PUSHES_IN_PROGRESS: Final = PREFIX + "weight_pushes_in_progress"
"""Running ones and those that wait for them."""
LAST_COMMIT: Final = PREFIX + "weight_last_commit_timestamp_seconds"
"""Unix time of the last push committed by this process; 0 before the first."""
AUDITS: Final = PREFIX + "weight_audits_total"
AUDITS_LABELS: Final = ("outcome",)
"""``intact``, ``mismatch``, or ``incomplete``: an engine could not be asked."""
AUDIT_DURATION: Final = PREFIX + "weight_audit_duration_seconds"
"""Histogram of the seconds of each engine."""
AUDIT_MISMATCHES: Final = PREFIX + "weight_audit_mismatched_engines_total"

READY_ENGINES: Final = PREFIX + "ready_engines"
TARGET_ENGINES: Final = PREFIX + "target_engines"
POOL_LABELS: Final = ("pool",)
POOL_TARGET: Final = PREFIX + "pool_target_engines"
POOL_SERVING: Final = PREFIX + "pool_serving_engines"
POOL_QUARANTINED: Final = PREFIX + "pool_quarantined"
"""1 while the pool replaces no engine, because it lost more than ``engine.restart_budget``."""
POOL_LOSSES: Final = PREFIX + "pool_engine_losses_total"
"""Engines that did not start, died or were given up."""
ENGINES_GIVEN_UP: Final = PREFIX + "engines_given_up_total"
ENGINES_GIVEN_UP_LABELS: Final = ("reason",)
"""``no_progress``, ``frozen`` or ``no_status``."""
AUTOSCALING_CHANGES: Final = PREFIX + "autoscaling_changes_total"
AUTOSCALING_LABELS: Final = ("reason",)
"""``shared.pool_types.ScalingReason``; those that change nothing stay at 0."""
DRAINING: Final = PREFIX + "draining"
"""1 once the server has got SIGTERM and refuses new requests."""
ENGINE_HEALTH: Final = PREFIX + "engine_health"
ENGINE_HEALTH_LABELS: Final = ("engine", "health")
"""1 for the health the engine has, 0 for the others."""
ENGINE_CIRCUIT: Final = PREFIX + "engine_circuit"
ENGINE_CIRCUIT_LABELS: Final = ("engine", "circuit")
"""1 for the state the engine's circuit breaker is in, 0 for the others."""
CIRCUIT_OPENINGS: Final = PREFIX + "circuit_openings_total"
"""Times an engine that serves failed so many groups in a row that others are preferred to it."""
ENGINE_LABELS: Final = ("engine",)
ENGINE_STATE: Final = PREFIX + "engine_state"
ENGINE_STATE_LABELS: Final = ("engine", "state")
"""1 for the state the engine is in, 0 for the others."""
ENGINE_KV_CACHE_USAGE: Final = PREFIX + "engine_kv_cache_usage"
ENGINE_KV_CACHE_CAPACITY: Final = PREFIX + "engine_kv_cache_capacity_tokens"
ENGINE_UPTIME: Final = PREFIX + "engine_uptime_seconds"
ENGINE_STATUS_AGE: Final = PREFIX + "engine_status_age_seconds"
"""Since the engine last answered the status poller: grows when it hangs."""
ENGINE_METRICS_AGE: Final = PREFIX + "engine_metrics_age_seconds"
"""Age of the metrics of vLLM that are passed on for this engine."""
ENGINE_RUNNING: Final = PREFIX + "engine_running_requests"
ENGINE_WAITING: Final = PREFIX + "engine_waiting_requests"
ENGINE_RESERVED: Final = PREFIX + "engine_reserved_samples"
ENGINE_TARGET_VERSION: Final = PREFIX + "engine_target_weight_version"
ENGINE_DRAFTER_VERSION: Final = PREFIX + "engine_drafter_weight_version"
ENGINE_PREEMPTIONS: Final = PREFIX + "engine_preemptions_total"
ENGINE_PROMPT_TOKENS: Final = PREFIX + "engine_prompt_tokens_total"
ENGINE_GENERATION_TOKENS: Final = PREFIX + "engine_generation_tokens_total"
ENGINE_SPECULATIVE_TOKENS: Final = PREFIX + "engine_num_speculative_tokens"
"""Draft length of the engine's latest step."""
ENGINE_DRAFTS: Final = PREFIX + "engine_drafts_total"
ENGINE_DRAFT_TOKENS: Final = PREFIX + "engine_draft_tokens_total"
ENGINE_ACCEPTED_TOKENS: Final = PREFIX + "engine_accepted_tokens_total"
ENGINE_SPECULATION_SWITCHES: Final = PREFIX + "engine_speculation_switches_total"
ENGINE_SPECULATION_MODE: Final = PREFIX + "engine_speculation_mode"
ENGINE_SPECULATION_MODE_LABELS: Final = ("engine", "mode")
"""1 for the mode the engine follows, 0 for the others."""
ENGINE_STEPS: Final = PREFIX + "engine_steps_total"
"""Engine steps by their draft length ``k``."""
ENGINE_STEP_SECONDS: Final = PREFIX + "engine_step_seconds_total"
"""Their seconds: the share of time spent at each draft length."""
ENGINE_DRAFT_LENGTH_LABELS: Final = ("engine", "k")
ENGINE_STEPS_BY_REASON: Final = PREFIX + "engine_steps_by_reason_total"
ENGINE_STEPS_BY_REASON_LABELS: Final = ("engine", "reason")
"""``shared.types.SpeculationReason``."""
ENGINE_PREDICTED_STEPS: Final = PREFIX + "engine_predicted_steps_total"
"""Steps whose seconds were predicted."""
ENGINE_PREDICTED_SECONDS: Final = PREFIX + "engine_predicted_step_seconds_total"
ENGINE_REALISED_SECONDS: Final = PREFIX + "engine_realised_step_seconds_total"
"""What those steps took."""
ENGINE_STEP_TIME_ERROR: Final = PREFIX + "engine_step_time_error_median"
"""Median of ``|predicted / realised - 1|`` over the latest of them; absent without any."""
ENGINE_ACCEPTANCE: Final = PREFIX + "engine_draft_acceptance"
ENGINE_ACCEPTANCE_LABELS: Final = ("engine", "position")
"""Moving share of accepted drafts at a position, given that all before it were accepted."""
ENGINE_ACCEPTANCE_CHANGES: Final = PREFIX + "engine_draft_acceptance_changes_total"
"""Times it had changed beyond chance."""
ENGINE_DECISION_KV_CACHE_USAGE: Final = PREFIX + "engine_decision_kv_cache_usage"
"""Histogram of the fraction of KV blocks in use when a step was decided."""
ENGINE_COST_MODEL: Final = PREFIX + "engine_cost_model_info"
ENGINE_COST_MODEL_LABELS: Final = ("engine", "source")
"""1 for the source of the cost model: a calibration's name, ``self`` or ``conservative``."""
ENGINE_MACHINE_FACTOR: Final = PREFIX + "engine_machine_factor"
"""How much slower than calibrated every step is now."""
