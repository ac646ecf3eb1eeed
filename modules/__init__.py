"""What learns: LightningModules, one folder a method, on shared cores (see README, "The house")."""
