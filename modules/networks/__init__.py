"""nn.Modules without Lightning."""
