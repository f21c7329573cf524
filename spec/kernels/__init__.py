"""CPU code: C++ operators, packed weights for them, and the abilities of this CPU."""
