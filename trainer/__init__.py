"""The trainer: GRPO against any rollout server that speaks the HTTP contract.

::

    tasks/ -> rollout_client (HTTP) -> samples -> advantages -> batching -> policy -> loss
           -> optimization -> publish (safetensors, POST /v1/weights) -> next prompts

| loop (process or thread)       | consumes            | waits for               | unblocked by  |
|--------------------------------|---------------------|-------------------------|---------------|
| training loop (trainer actor)  | finished groups     | rollouts, a weight push | the server    |
| speculation log (thread in it) | ``/v1/speculation`` | its interval            | clock, a stop |
"""
