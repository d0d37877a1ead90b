"""Rewards, run in worker processes so that no reward function can hold up or take down the API."""
