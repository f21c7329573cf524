"""Code for the processor: C++ operators, the layouts of weights that they read, and what this CPU can do."""
