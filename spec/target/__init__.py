"""How a Hugging Face model is run: slots, masks and attention of a tree, taps, self-test, and loading."""
