"""Video diffusion models: loading them, what differs from family to family, rendering, making them sparse."""
