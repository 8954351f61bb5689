"""What models of inputs compute: embeddings, scores of pairs, classes."""
