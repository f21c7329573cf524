"""Running a Hugging Face model on trees: slot cache, masks, attention, taps, self-test, and loading."""
