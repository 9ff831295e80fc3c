"""Floor 3: what is trained. Config, data, model, loss, metrics, trainer, checkpoint, command line."""
