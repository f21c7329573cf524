"""The training of drafters: data, objectives, losses, one trainer for every kind, evaluation."""
