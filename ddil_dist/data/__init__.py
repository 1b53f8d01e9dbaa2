"""Image-text data: captions and images in, VAE-scaled latents out."""
