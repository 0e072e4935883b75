"""Images: loaders, and the bundled sample."""

from groupconv.data.images import Images, load_images

__all__ = ["Images", "load_images"]
