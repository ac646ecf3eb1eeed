"""Measures of trained modules as pure functions of what they compute; probes make figures of them."""
