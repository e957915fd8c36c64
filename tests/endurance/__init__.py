"""Long runs and many users of one process: `make endurance`."""
