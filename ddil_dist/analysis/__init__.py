"""Is a student's trouble the states that it makes itself? Covariate shift, measured against the teacher.

two_sample   how far two sets of states lie apart
intervals    bootstrap intervals
shift        the student's errors at visited and at forward-diffused states, and how they compound
mixtures     trajectories that teacher and student share (the paper's appendix E)
results      what was found, its file, and the verdict in words; no torch
"""
