"""Planning which tree to draft: acceptance, step times, and stored plans."""
