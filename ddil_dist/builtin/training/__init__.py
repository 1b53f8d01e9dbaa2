"""How the built-in assets are made, one part a file; `ddil_dist.builtin.build` runs them in order."""
