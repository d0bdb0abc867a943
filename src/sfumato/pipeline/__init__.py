"""From a request to pictures: request, noise, pipeline, picture (a PNG with its request inside)."""
