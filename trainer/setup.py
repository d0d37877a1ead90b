"""Builds the training loop from the configuration: model, task, checkpoint, server's version."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer

from shared.config.metric_sinks import check_metric_sinks
from shared.config.run import RunConfig
from shared.credentials import ClientCredentials
from shared.errors import ConfigurationError
from trainer.checkpoint import Checkpoint, CheckpointStore, restore
from trainer.loop import TrainingLoop
from trainer.loop_parts import LoopParts, LoopStart
from trainer.metric_sinks import MetricSinks, open_sinks
from trainer.optimization import Optimization
from trainer.policy import Policy, resolve_device
from trainer.policy_history import PolicyHistory
from trainer.publish import Publisher
from trainer.recorder import RunRecorder
from trainer.rollout_client import RolloutClient
from trainer.speculation_log import SpeculationLog
from trainer.status import StatusBoard
from trainer.tasks import build_task
from trainer.versions import VersionRecord, agree_on_version

LOGGER = logging.getLogger(__name__)

CHECKPOINTS_DIRECTORY = "checkpoints"
VERSION_FILE = "announced_version.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """A loop ready to run, and what must be entered and closed around it."""

    loop: TrainingLoop
    client: RolloutClient
    speculation: SpeculationLog
    sinks: MetricSinks


def build_trainer(
    config: RunConfig,
    credentials: ClientCredentials | None,
    *,
    resume: bool,
    board: StatusBoard,
    stop: threading.Event,
) -> Trainer:
    """Load everything and agree with the server on a version.

    Raises:
        ConfigurationError: no server URL, an unusable model, task, run directory or metric sink.
        SlipstreamError: the server stayed away, or refused the weights of a resumed run.
    """
    options = config.trainer
    if options.server_url is None:
        raise ConfigurationError(
            "trainer.server_url is not set: which rollout server?", param="trainer.server_url"
        )
    check_metric_sinks(options)
    # Explicitly also for 0: Ray gives actors OMP_NUM_THREADS=1, which is not torch's default.
    torch.set_num_threads(options.num_threads or len(os.sched_getaffinity(0)))
    torch.manual_seed(config.seed)
    checkpoints = CheckpointStore(
        config.run_dir / CHECKPOINTS_DIRECTORY, keep=options.keep_checkpoints
    )
    checkpoint = checkpoints.latest() if resume else None
    if resume and checkpoint is None:
        LOGGER.warning("--resume: no checkpoint in %s, starting at step 0", config.run_dir)
    recorder = RunRecorder(config.run_dir)
    recorder.prepare(
        resume_after_step=checkpoint.state.step if checkpoint else (-1 if resume else None)
    )
    task = build_task(options.task)
    policy, tokenizer, optimization = _build_policy(config, checkpoint)
    client = RolloutClient(
        options.server_url,
        timeout_s=options.api_timeout_s,
        credentials=credentials,
        pause=stop.wait,
    )
    client.wait_until_ready()
    record = VersionRecord(config.run_dir / VERSION_FILE)
    publisher = Publisher(
        client, config.weights, announce=record.announce, max_retries=options.push_retries
    )
    version = agree_on_version(
        client,
        publisher,
        policy,
        record,
        checkpointed=checkpoint.state.weight_version if checkpoint else None,
    )
    history = checkpoint.state.history if checkpoint else PolicyHistory()
    speculation = SpeculationLog(client, recorder)
    completed_steps = checkpoint.state.step if checkpoint else 0
    sinks = open_sinks(config, completed_steps=completed_steps, is_resumed=resume)
    loop = TrainingLoop(
        LoopParts(
            client=client,
            task=task,
            policy=policy,
            tokenizer=tokenizer,
            optimization=optimization,
            publisher=publisher,
            checkpoints=checkpoints,
            recorder=recorder,
            sinks=sinks,
            speculation=speculation,
            board=board,
            stop=stop,
            run_id=f"{config.name}-{uuid.uuid4().hex[:8]}",
        ),
        config,
        LoopStart(
            completed_steps=completed_steps,
            weight_version=version,
            history=history.served(version),
            pending=checkpoint.state.pending if checkpoint else (),
            is_checkpointed=checkpoint is not None,
        ),
    )
    return Trainer(loop=loop, client=client, speculation=speculation, sinks=sinks)


def _build_policy(
    config: RunConfig, checkpoint: Checkpoint | None
) -> tuple[Policy, Any, Optimization]:
    policy = Policy.load(
        checkpoint.path if checkpoint else config.model.path,
        config.model,
        device=resolve_device(config.trainer.device),
    )
    tokenizer = AutoTokenizer.from_pretrained(
        config.model.path, trust_remote_code=config.model.trust_remote_code
    )
    optimization = Optimization(policy.model, config.trainer.optimizer)
    if checkpoint is not None:
        restore(checkpoint, optimization)
        LOGGER.info("resumed %s at step %d", checkpoint.path, checkpoint.state.step)
    return policy, tokenizer, optimization
