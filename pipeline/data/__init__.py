"""Images and labels: where they come from, and the prepared splits on disk."""
