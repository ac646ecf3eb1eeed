"""Routing problems: rules, instances, files, references. The datamodules stand beside this folder."""
