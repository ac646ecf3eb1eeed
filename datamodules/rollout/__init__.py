"""The rollout core: environments stepped by a policy, replay, evaluation, and their exact position."""
