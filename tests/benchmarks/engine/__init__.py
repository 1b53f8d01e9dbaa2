"""The rollout engine beside other ways to make the same states, at the built-in pipeline's size."""
