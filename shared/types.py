"""Enums used on both sides of the wire, each lifecycle with its written transitions."""

from enum import StrEnum


class EngineState(StrEnum):
    """Lifecycle of one rollout engine (one Ray actor around one vLLM ``AsyncLLM``)."""

    STARTING = "starting"
    """Loading weights and warming up. Never receives traffic."""
    SERVING = "serving"
    """Accepts requests and generates."""
    PAUSED = "paused"
    """Accepts requests, generates nothing until resumed."""
    SYNCING = "syncing"
    """Inside a weight commit: paused, target and drafter are being replaced."""
    DRAINING = "draining"
    """Finishes what it has, accepts nothing new, then stops."""
    DEAD = "dead"
    """Gone or poisoned. Final: a replacement is a new engine with a new id."""


ENGINE_TRANSITIONS: dict[EngineState, frozenset[EngineState]] = {
    # Straight to PAUSED where it joins while generation is paused.
    EngineState.STARTING: frozenset({EngineState.SERVING, EngineState.PAUSED, EngineState.DEAD}),
    EngineState.SERVING: frozenset(
        {EngineState.PAUSED, EngineState.SYNCING, EngineState.DRAINING, EngineState.DEAD}
    ),
    EngineState.PAUSED: frozenset(
        {EngineState.SERVING, EngineState.SYNCING, EngineState.DRAINING, EngineState.DEAD}
    ),
    # A commit ends in the state it began from, or the engine is poisoned.
    EngineState.SYNCING: frozenset({EngineState.SERVING, EngineState.PAUSED, EngineState.DEAD}),
    EngineState.DRAINING: frozenset({EngineState.DEAD}),
    EngineState.DEAD: frozenset(),
}


class FinishReason(StrEnum):
    """Why a sample ended, in vLLM's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class RolloutRunState(StrEnum):
    """Lifecycle of one ``POST /v1/rollouts`` on the server; both ends are final."""

    RUNNING = "running"
    FINISHED = "finished"
    """Every group is there; after a ``DELETE`` some samples end with ``finish_reason: abort``."""
    FAILED = "failed"
    """Ended by an error; posting the same request again goes on with the missing groups."""


class RewardStatus(StrEnum):
    """What became of a sample's reward. A failed reward is data, never a lost sample."""

    OK = "ok"
    ERROR = "error"
    """The reward function raised."""
    TIMEOUT = "timeout"
    """The reward function did not answer in time; its worker was replaced."""
    SKIPPED = "skipped"
    """No reward was asked for, or the sample was aborted."""


class SpeculationMode(StrEnum):
    """How an engine decides whether to draft."""

    OFF = "off"
    """Never drafts."""
    ALWAYS = "always"
    """Drafts at every step, whatever the load (for benchmarks)."""
    KV_GATE = "kv_gate"
    """Drafts a fixed length while KV-cache occupancy is below the threshold."""
    ADAPTIVE = "adaptive"
    """Below the threshold, the draft length that makes the most tokens per second; 0 included."""


class SpeculationReason(StrEnum):
    """Why a step drafts as many tokens as it does."""

    MODE_OFF = "mode_off"
    MODE_ALWAYS = "mode_always"
    BELOW_THRESHOLD = "below_threshold"
    ABOVE_THRESHOLD = "above_threshold"
    DWELL = "dwell"
    """The gate wants to open but has been closed for fewer than ``min_dwell_steps``."""
    STALE_DRAFTER = "stale_drafter"
    """Target and drafter versions differ: drafting waits for the requantization."""
    NO_ROOM = "no_room"
    """KV slots for drafts could take blocks that plain decoding will need."""
    PREDICTED_FASTER = "predicted_faster"
    """The cost model expects more tokens per second of this draft length than of any other."""
    PREDICTED_SLOWER = "predicted_slower"
    """The cost model expects plain decoding to be fastest, or no length to be worth the switch."""
    EXPLORING = "exploring"
    """A draft length not tried lately is tried for a few steps."""


class TokenOrigin(StrEnum):
    """How a token of a sample came about. One letter each."""

    PLAIN = "p"
    """Sampled by the policy in a step without drafts."""
    ACCEPTED = "a"
    """Drafted, and accepted by the policy."""
    RECOVERED = "r"
    """Sampled by the policy in the place of a draft that it rejected."""
    BONUS = "b"
    """Sampled by the policy behind drafts that it had all accepted."""
    UNKNOWN = "?"
    """Sampled by an engine that died since."""


class DeadEnginePolicy(StrEnum):
    """What becomes of unfinished samples when their engine dies."""

    CONTINUE = "continue"
    """Another engine goes on behind the tokens there are; their logprobs and versions are kept.
    Samples with a seed, stop strings, or presence or frequency penalties start over."""
    RESTART = "restart"
    """They start over."""


class PauseMode(StrEnum):
    """What a pause does to running sequences, as vLLM's ``pause_generation`` means it."""

    KEEP = "keep"
    """Freeze them; they go on after the resume, under the new weights if there was a commit."""
    WAIT = "wait"
    """Let them finish first."""
    ABORT = "abort"
    """End them; partial output is returned with ``finish_reason: abort``."""


class DrafterRebuild(StrEnum):
    """When the drafter is made anew after a push."""

    BETWEEN_STEPS = "between_steps"
    """After generation has resumed, some layers between every two steps. Nothing is drafted until
    it is done."""
    IN_PAUSE = "in_pause"
    """Before generation resumes."""


class DrafterScheme(StrEnum):
    """Round-to-nearest scheme of the drafter's linear layers."""

    AUTO = "auto"
    """The best for the device: ``int8`` on CPU, ``int4`` on CUDA."""
    INT8 = "int8"
    """W8A8: per-output-channel weights, per-token dynamic activations."""
    INT4 = "int4"
    """W4A16: groups of input channels, activations untouched."""
    FP8 = "fp8"
    """W8A8 in float8 e4m3: per-output-channel weights, per-token dynamic activations."""
    NONE = "none"
    """Unquantized copy of the target: the diagnostic whose acceptance must be 100 %."""


class TransportKind(StrEnum):
    """How the bytes of a weight push reach the engines."""

    SHARED_MEMORY = "shared_memory"
    """A safetensors file in /dev/shm, mapped by every engine on the host."""
    FILESYSTEM = "filesystem"
    """A safetensors file in a directory that trainer, server and every engine's host share."""
    RAY = "ray"
    """Bucket by bucket through Ray's object store: trainer, server and engines on any node."""
    NCCL = "nccl"
    """Broadcast from the trainer to the server's node and every node with engines at once, over
    NCCL where every member has a GPU of its own, else over gloo."""


class SegmentEncoding(StrEnum):
    """What the file of a push holds."""

    FULL = "full"
    """Every tensor."""
    DELTA = "delta"
    """What changed since the base version (``shared/weight_delta.py``)."""


class DeltaMode(StrEnum):
    """When a trainer pushes only what changed."""

    AUTO = "auto"
    """Where bytes are dear, over a shared disk: as ``on``; in shared memory, where finding out what
    changed takes longer than writing everything: as ``off``."""
    ON = "on"
    """When the base can be read, and the delta is at most ``weights.delta_max_share`` of it."""
    OFF = "off"
    """Every push holds every tensor."""


class CommitPolicy(StrEnum):
    """How many engines must have loaded a push for it to be committed."""

    ALL = "all"
    """Every engine that staged it; otherwise those that loaded it go back to the version before."""
    QUORUM = "quorum"
    """``weights.commit_quorum`` of them; the others are replaced."""


class LostSnapshotPolicy(StrEnum):
    """What a server does that finds its last committed weights gone when it starts again."""

    FAIL = "fail"
    """Refuse to start, and say what is missing."""
    MODEL = "model"
    """Serve the model directory as version 0. Versions used before are never taken again."""


class PushPhase(StrEnum):
    """Where a weight push stands. Both ends are final."""

    VERIFYING = "verifying"
    """Names, shapes, dtypes, digests and finiteness, on the server."""
    STAGING = "staging"
    """Every engine checks it against its model."""
    LOADING = "loading"
    """Engines are paused and replace target and drafter; none generates with the new version."""
    COMMITTED = "committed"
    """Recorded; engines resume on the new version."""
    ROLLING_BACK = "rolling_back"
    """Too few engines could load it: those that did load the version before again."""
    REFUSED = "refused"
    """The version before serves on every engine."""


PUSH_TRANSITIONS: dict[PushPhase, frozenset[PushPhase]] = {
    PushPhase.VERIFYING: frozenset({PushPhase.STAGING, PushPhase.REFUSED}),
    PushPhase.STAGING: frozenset({PushPhase.LOADING, PushPhase.REFUSED}),
    # Straight to REFUSED where every engine was drained meanwhile, or the server shuts down.
    PushPhase.LOADING: frozenset({PushPhase.COMMITTED, PushPhase.ROLLING_BACK, PushPhase.REFUSED}),
    PushPhase.ROLLING_BACK: frozenset({PushPhase.REFUSED}),
    PushPhase.COMMITTED: frozenset(),
    PushPhase.REFUSED: frozenset(),
}


class ApiScope(StrEnum):
    """What an API key allows. None includes another."""

    ROLLOUT = "rollout"
    """Generate, fetch and abort: ``/v1/rollouts``, ``/v1/completions``, ``/v1/models``."""
    ADMIN = "admin"
    """See and steer engines, weights and speculation; and read ``/metrics``."""
    METRICS = "metrics"
    """Read ``/metrics``."""


class NetworkAccess(StrEnum):
    """Whether scoring workers may open sockets."""

    ALLOW = "allow"
    DENY = "deny"


class LogLevel(StrEnum):
    """Threshold of our own loggers, in logging's words."""

    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


class LogFormat(StrEnum):
    """Form of a log line."""

    TEXT = "text"
    JSON = "json"


class MetricSinkKind(StrEnum):
    """Where a trainer's metrics go beside the run's own files."""

    TENSORBOARD = "tensorboard"
    """Event files in ``<run_dir>/tensorboard``."""
    WANDB = "wandb"
    """Weights & Biases."""
    TRACKIO = "trackio"
    """Local, or wherever trackio's own variables say."""
