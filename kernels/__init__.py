"""Floor 1: one device's math on jagged tensors. Knows nothing of ranks or process groups."""
