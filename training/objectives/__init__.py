"""What each kind of drafter adds to the trainer: its network, its loss, and how it is judged."""
