"""What documentation and examples say about clients, run against the API over fake engines."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rollout_server.scoring.types import RewardResult, ScoreJob
from shared.client import RolloutClient
from shared.schemas.rollouts import PromptItem
from shared.schemas.weights import PublishRequest, PublishResponse
from shared.types import RewardStatus
from tests.fakes.engine import FakeEngine, fake_tokens
from tests.fakes.http_server import serving
from tests.fakes.service import FakeCoordinator, FakeScorer, fake_service
from trainer.examples import bare_loop

ROOT = Path(__file__).parents[2]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/client.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
async def test_a_snippet_of_the_documentation_runs(index: int) -> None:
    async with serving(fake_service([FakeEngine("a")])) as url:
        code = SNIPPETS[index].replace("http://127.0.0.1:8000", url)
        run = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert run.returncode == 0, run.stderr
    assert run.stdout


class FirstLetter(FakeScorer):
    """The further back in the alphabet a completion begins, the better."""

    async def score(self, job: ScoreJob) -> RewardResult:
        reward = (ord(job.completion[0]) - 97) / 26
        return RewardResult(reward=reward, status=RewardStatus.OK, detail={}, duration_s=0.0)


class KeepsWeights(FakeCoordinator):
    """Reads what is pushed."""

    def __init__(self) -> None:
        super().__init__()
        self.pushed: list[dict[str, torch.Tensor]] = []
        self.paths: list[Path] = []

    async def publish(self, request: PublishRequest) -> PublishResponse:
        path = Path("/dev/shm") / request.manifest.segment
        self.paths.append(path)
        self.pushed.append(safetensors.torch.load_file(path))
        return await super().publish(request)


def logprob(model: LlamaForCausalLM, prompt: bytes, token_id: int) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(prompt)])).logits[0, -1]
    return float(logits.log_softmax(-1)[token_id])


async def test_the_bare_loop_learns_what_is_rewarded_and_publishes_it() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    prompt = b"ab"
    first_letters = [fake_tokens(list(prompt), index, 1)[0] for index in range(8)]
    best, worst = max(first_letters), min(first_letters)
    before = logprob(model, prompt, best) - logprob(model, prompt, worst)
    coordinator = KeepsWeights()
    service = fake_service(scorer=FirstLetter(), coordinator=coordinator)
    async with serving(service) as url:
        with RolloutClient(url) as client:
            await asyncio.to_thread(
                bare_loop.train,
                client,
                model,
                [PromptItem(prompt="ab"), PromptItem(prompt="cd")],
                reward="length",
                num_steps=4,
            )
    assert coordinator.committed_version == 4
    assert logprob(model, prompt, best) - logprob(model, prompt, worst) > before
    pushed = coordinator.pushed[-1]
    assert pushed.keys() == dict(model.named_parameters()).keys()
    assert "lm_head.weight" not in pushed
    for name, parameter in model.named_parameters():
        assert torch.equal(pushed[name], parameter.detach())
    assert not any(path.exists() for path in coordinator.paths)


def test_no_snippet_is_overlooked() -> None:
    assert len(SNIPPETS) == 6
    assert all("http://127.0.0.1:8000" in snippet for snippet in SNIPPETS)


def test_the_example_is_as_short_as_it_is_said_to_be() -> None:
    source = Path(bare_loop.__file__).read_text()
    assert len(source.splitlines()) < 60
    assert "import ray" not in source
