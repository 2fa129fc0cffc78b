"""A trained network at work: prediction on the source grid, scores, pictures."""
