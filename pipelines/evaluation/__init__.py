"""What the evaluate stage is made of: what is measured of images, the Ray Data job over them, the page."""
