"""sdlora trains LoRAs for Stable Diffusion and shows that they worked."""

__version__ = "0.1.0"
