"""Views: which ones a method uses, how they are augmented, and how two images are mixed."""
