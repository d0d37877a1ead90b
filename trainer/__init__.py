"""The trainer: GRPO against any rollout server that speaks the HTTP contract.

::

    tasks/ -> batches (batch_plan) -> sampling -> rollout_client (HTTP)
           -> samples (policy_history) -> advantages -> batching -> policy -> loss
           -> optimization -> publish (safetensors, POST /v1/weights) -> next prompts

| loop (process or thread)         | consumes            | waits for               | unblocked by  |
|----------------------------------|---------------------|-------------------------|---------------|
| training loop (trainer actor)    | finished groups     | rollouts, a weight push | the server    |
| rollout request (thread of each) | its stream          | the next group          | the server    |
| speculation log (thread in it)   | ``/v1/speculation`` | its interval            | clock, a stop |
"""
