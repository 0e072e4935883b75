"""Images: loaders, and the bundled sample."""

from groupconv.data.images import Images, largest_map, load_images

__all__ = ["Images", "largest_map", "load_images"]
