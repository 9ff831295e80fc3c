"""Floor 4: put a job on machines. Knows nothing of models or tensors."""
