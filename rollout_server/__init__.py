"""The rollout service: prompts in, scored samples of the current policy out.

::

    HTTP request -> api/ -> router/ (choose, reserve) -> engine/ (Ray actor, vLLM AsyncLLM)
                                                         | drafter/      quantized policy
                                                         | speculation/  draft length, every step
                 <- api/ <- scoring/ (worker processes) <- completions
    weight push  -> api/ -> weights/ (stage, verify, pause, load, requantize, commit, resume)

| loop (process)                  | consumes           | waits for             | unblocked by     |
|---------------------------------|--------------------|-----------------------|------------------|
| request handler (API, async)    | HTTP request       | an engine with room   | router, commit   |
| vLLM engine core (own process)  | admitted requests  | work, or an update    | actor call       |
| speculation controller (in it)  | load, every step   | nothing (synchronous) | -                |
| scoring workers (processes)     | finished samples   | a job                 | scoring pool     |
| weight coordinator (API, async) | published manifest | its lock; all engines | engines          |
| status poller (API, async)      | engine status      | its interval          | clock            |
"""
