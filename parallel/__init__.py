"""Floor 2: who holds what and how it moves. Knows nothing of losses or configuration files."""
