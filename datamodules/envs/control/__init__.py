"""Continuous-control environments, stepped as one batch."""
