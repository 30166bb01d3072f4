"""Images and labels: data sets by name, picture files, and the prepared splits on disk."""
