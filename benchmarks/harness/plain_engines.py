"""What two engines make of one on two cores where nothing else runs: vLLM without our plugin.

Each engine is vLLM's own ``LLM``, computing on one core, with as many sequences as an engine of
``bench-scale`` has; no server, no Ray. As there, one and two of them take turns.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.harness.checked_load import NUM_PROMPT_TOKENS

NUM_BATCHES = 4
"""Per side and repeat: some 10 s."""
ANSWER_TIMEOUT_S = 300.0
"""For a start, or for the batches."""
END_TIMEOUT_S = 60.0


class PlainEngine:
    """An engine in a child process; ``begin`` and ``seconds`` belong together.

    Args:
        num_seqs: of a batch; all of its sequences are equally long.
    """

    def __init__(self, model: Path, core: int, num_seqs: int, num_tokens: int) -> None:
        self.num_tokens = NUM_BATCHES * num_seqs * num_tokens
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, str(model), num_seqs, num_tokens)
        self._process = context.Process(target=_serve, args=arguments, name=f"plain-{core}")
        with _environment(_variables(core)):
            self._process.start()
        theirs.close()  # so that its end is ours

    def await_ready(self) -> None:
        """Wait until it is warm.

        Raises:
            RuntimeError: it ended, or took too long.
        """
        self._answer("to start")

    def begin(self) -> None:
        """Generate the batches."""
        self._connection.send("go")

    def seconds(self) -> float:
        """Of what ``begin`` began, when it is done.

        Raises:
            RuntimeError: it ended, or took too long.
        """
        return float(self._answer("to generate"))

    def close(self) -> None:
        """It ends with its questions."""
        self._connection.close()
        self._process.join(END_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self, purpose: str) -> Any:
        try:
            if self._connection.poll(ANSWER_TIMEOUT_S):
                return self._connection.recv()
        except EOFError:
            self._process.join(END_TIMEOUT_S)
            raise RuntimeError(
                f"{self._process.name} ended with code {self._process.exitcode}"
            ) from None
        raise RuntimeError(f"{self._process.name} took over {ANSWER_TIMEOUT_S:g} s {purpose}")


def measure_plain(
    model: Path, cores: Sequence[int], num_seqs: int, num_tokens: int, repeats: int
) -> list[dict[str, float]]:
    """Tokens per second of either engine alone and of both together, in turn."""
    rounds = []
    with contextlib.ExitStack() as stack:
        engines = []
        for core in cores[:2]:
            engines.append(PlainEngine(model, core, num_seqs, num_tokens))
            stack.callback(engines[-1].close)
        for engine in engines:
            engine.await_ready()
        for repeat in range(repeats):
            alone = [_rate([engine]) for engine in engines]
            both = _rate(engines)
            rounds.append({"alone": sum(alone) / 2, "both": both, "ratio": 2 * both / sum(alone)})
            print(f"plain vLLM {repeat + 1}/{repeats}: {rounds[-1]}", file=sys.stderr)
    return rounds


def _rate(engines: Sequence[PlainEngine]) -> float:
    for engine in engines:
        engine.begin()
    return sum(e.num_tokens for e in engines) / max(e.seconds() for e in engines)


def _variables(core: int) -> dict[str, str]:
    variables = {
        "SLIPSTREAM_VLLM_PLUGIN": "0",
        "VLLM_CPU_OMP_THREADS_BIND": str(core),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "OMP_NUM_THREADS": "1",
    }
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    if library.is_file():  # as in engines of ours
        variables["LD_PRELOAD"] = str(library)
    return variables


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Of processes that start meanwhile."""
    saved = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def _serve(connection: Connection, model: str, num_seqs: int, num_tokens: int) -> None:
    """In the child: a question, a measurement."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=num_seqs,
        enable_prefix_caching=False,
        enforce_eager=True,  # as engines of ours
    )
    # As the service asks: sampled, seeded, each token with its logprob.
    sampling = [
        SamplingParams(
            temperature=1.0,
            seed=index,
            max_tokens=num_tokens,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
        )
        for index in range(num_seqs)
    ]
    prompts: list[Any] = [
        {"prompt_token_ids": [5 + index] * NUM_PROMPT_TOKENS} for index in range(num_seqs)
    ]
    llm.generate(prompts, sampling, use_tqdm=False)
    connection.send("ready")
    with contextlib.suppress(EOFError):  # nobody asks any more
        while True:
            connection.recv()
            started = time.perf_counter()
            for _ in range(NUM_BATCHES):
                llm.generate(prompts, sampling, use_tqdm=False)
            connection.send(time.perf_counter() - started)
