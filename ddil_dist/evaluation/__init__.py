"""Measuring any text-to-image pipeline of diffusers, ours or not, by one protocol.

stock       a pipeline as a function from prompts and seeds to images, its network calls counted
samples     its images on disk, each made once however often the work is cut off
networks    what measures them: which are at hand, and how to get the others
coco        the prompts and images of COCO as papers use them
pipelines   all of it, for several pipelines from the same noise
"""
