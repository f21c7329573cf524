"""Running engines: executors, the runs of calls, and the pool of runs that are kept for later calls."""
