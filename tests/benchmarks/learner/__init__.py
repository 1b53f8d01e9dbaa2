"""The learner's speed beside a bare loop and beside the inner loop of diffusers' LCM example."""
