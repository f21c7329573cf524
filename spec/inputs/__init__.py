"""What a call is given: its numbers, and its prompts."""
