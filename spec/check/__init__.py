"""`paceline check`: does every promise hold on this machine, and how fast is it here? One command, five parts."""
