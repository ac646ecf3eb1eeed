"""Environments as TorchRL EnvBase: tensor-native and batched first, adapters to third-party packages beside them."""
