"""Short authored stories with labelled choices (CC0), read by :mod:`datamodules.envs.oversight.story`."""
