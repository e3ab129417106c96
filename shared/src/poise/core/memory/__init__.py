"""What training remembers: averages of weights, values per sample, recent features, batch statistics."""
