"""Images of stained tissue: restoring their resolution, and classifying them."""
