"""Layer 4: optimizer and schedules."""
