"""Which tree to draft: acceptance, step times, and the plans that are kept."""
