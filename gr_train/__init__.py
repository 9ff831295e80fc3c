"""Floor 3: what is trained. Config, data, model, metrics, trainer, checkpoint, CLI."""
