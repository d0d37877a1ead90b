"""A bare PyTorch loop on the rollout service: REINFORCE with a group baseline, and nothing else.

python -m trainer.examples.bare_loop http://127.0.0.1:8000 MODEL_DIRECTORY
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from shared.client import RolloutClient, rollout_request
from shared.schemas.rollouts import PromptItem, RolloutGroup, SamplingOptions

PROMPTS = [PromptItem(prompt=f"{a}+{b}=", answer=str(a + b)) for a in (2, 3, 4) for b in (3, 5, 7)]


def group_loss(model: Any, group: RolloutGroup) -> torch.Tensor:
    """Raise the probability of samples that are better than their group's mean."""
    samples = [s for s in group.samples if s.reward is not None and s.token_ids]
    rewards = torch.tensor([sample.reward for sample in samples])
    losses = [torch.zeros(())]
    for sample, advantage in zip(samples, rewards - rewards.mean(), strict=True):
        token_ids = torch.tensor([group.prompt_token_ids + sample.token_ids], device=model.device)
        start = len(group.prompt_token_ids)
        logits = model(input_ids=token_ids).logits[0, start - 1 : -1].float()
        logprobs = logits.log_softmax(-1).gather(1, token_ids[0, start:, None])
        losses.append(-advantage * logprobs.mean().cpu())
    return torch.stack(losses).sum() / len(group.samples)


def train(
    client: RolloutClient, model: Any, prompts: Sequence[PromptItem], *, reward: str, num_steps: int
) -> None:
    """Sample, step, publish."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    sampling = SamplingOptions(max_tokens=16)
    for step in range(num_steps):
        request = rollout_request(prompts, n=8, sampling=sampling, reward=reward, max_policy_lag=1)
        rewards = []
        for group in client.stream_groups(request):  # gradients add up while others still run
            (group_loss(model, group) / len(prompts)).backward()
            rewards += [sample.reward or 0.0 for sample in group.samples]
        optimizer.step()
        optimizer.zero_grad()
        version = client.weights().committed_version + 1
        client.publish_weights(dict(model.named_parameters()), version=version)
        print(f"step {step}: reward {sum(rewards) / len(rewards):.3f}, version {version}")


if __name__ == "__main__":
    url, model_directory = sys.argv[1:]
    with RolloutClient(url) as rollout_client:
        rollout_client.wait_until_ready()
        policy = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
        train(rollout_client, policy, PROMPTS, reward="numeric_answer", num_steps=20)
