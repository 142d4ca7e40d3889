"""The embedded base model: a miniature Stable Diffusion and the drawn world that it knows."""
