"""Between diffusers' pipelines and the mathematics: loading, conditioning, denoisers, the student, and its export."""
