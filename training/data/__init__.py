"""Training data: the target's own answers, mixtures of text, and rows packed from them."""
