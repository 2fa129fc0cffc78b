"""Training: what Lightning's trainer is given, exact resume, and the run directory."""
