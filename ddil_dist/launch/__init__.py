"""Starting or resuming a run: `python -m ddil_dist.launch`.

The composition root: it alone imports both `actors` and `learner`.
"""
