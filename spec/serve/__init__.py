"""In-flight batching: requests come and go while others are decoded; `generate_many` and the server are its clients."""
