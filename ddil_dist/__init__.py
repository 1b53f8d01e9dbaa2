"""Distil text-to-image diffusion pipelines into few-step students by imitation learning (DDIL)."""

__version__ = "0.1.0"
