"""Multiple-instance learning: bags of features, models that pool them by attention, and regularizers of that attention."""
