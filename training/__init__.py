"""The training of drafters: data, losses, trainer, evaluation. Nothing is here yet."""
