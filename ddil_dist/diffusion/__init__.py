"""The mathematics of variance-preserving diffusion: schedule, grids, parameterizations, DDIM, guidance, thresholding.

Pure functions of tensors. Everything between network calls is float32, whatever precision the networks run in.
"""
