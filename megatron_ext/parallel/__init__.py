"""Layer 3: ranks, degrees, devices, process groups."""
