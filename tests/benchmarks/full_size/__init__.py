"""The learner's update and the rollout engine's calls on networks of full size, of random weights."""
