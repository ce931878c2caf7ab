"""Layer 5: one iteration, the loop around it, and what it reports."""
