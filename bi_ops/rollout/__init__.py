"""Rollout engines: what samples, with log-probabilities that training reproduces bit for bit."""
