"""The rollout service in trainers other than ours."""
