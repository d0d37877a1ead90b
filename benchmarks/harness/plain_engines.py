"""What two engines make of one on two cores where nothing else runs: vLLM without our plugin.

Each engine is vLLM's own ``LLM``, computing on one core, with as many sequences as an engine of
``bench-scale`` has; no server, no Ray. As there, one and two of them take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.harness.checked_load import NUM_PROMPT_TOKENS

READY = "ready"
NUM_BATCHES = 4
"""Per side and repeat: some 10 s."""


class PlainEngine:
    """A child process; ``begin`` and ``seconds`` belong together.

    Args:
        num_seqs: of a batch; all of its sequences are equally long.
    """

    def __init__(self, model: Path, core: int, num_seqs: int, num_tokens: int) -> None:
        self.num_tokens = NUM_BATCHES * num_seqs * num_tokens
        options = [str(model), str(core), str(num_seqs), str(num_tokens)]
        environment = {
            "SLIPSTREAM_VLLM_PLUGIN": "0",
            "VLLM_CPU_OMP_THREADS_BIND": str(core),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_USE_V2_MODEL_RUNNER": "0",
        }
        library = Path(sys.prefix) / "lib" / "libiomp5.so"
        if library.is_file():  # as in engines of ours
            environment["LD_PRELOAD"] = str(library)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.harness.plain_engines", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | environment,
            text=True,
        )

    def await_ready(self) -> None:
        """Wait until it is warm."""
        while self._line() != READY:
            pass  # vLLM prints there, too

    def begin(self) -> None:
        """Generate the batches."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def seconds(self) -> float:
        """Of what ``begin`` began, when it is done."""
        while True:
            line = self._line()
            if line.startswith("{"):
                return float(json.loads(line)["seconds"])

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a plain engine ended with code {self._process.wait()}")
        return line.strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # its loop ends with its input
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def measure_plain(
    model: Path, cores: Sequence[int], num_seqs: int, num_tokens: int, repeats: int
) -> list[dict[str, float]]:
    """Tokens per second of either engine alone and of both together, in turn."""
    rounds = []
    with (
        PlainEngine(model, cores[0], num_seqs, num_tokens) as first,
        PlainEngine(model, cores[1], num_seqs, num_tokens) as second,
    ):
        engines = (first, second)
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


def _serve(model: str, num_seqs: int, num_tokens: int) -> None:
    """In the child: a line of input, a measurement."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=num_seqs,
        enable_prefix_caching=False,
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
    print(READY, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        for _ in range(NUM_BATCHES):
            llm.generate(prompts, sampling, use_tqdm=False)
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("core")
    parser.add_argument("num_seqs", type=int)
    parser.add_argument("num_tokens", type=int)
    options = parser.parse_args()
    _serve(options.model, options.num_seqs, options.num_tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
