"""Worked examples for few-shot chain of thought, one YAML file per answer kind, in words of our own."""
