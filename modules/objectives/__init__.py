"""Losses and estimators as pure functions."""
