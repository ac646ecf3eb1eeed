"""Robust control that several methods share: perturbation sets, attacks, policies, PPO, the two-player actor."""
