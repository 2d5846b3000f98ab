"""Questions about simulated scenes, with answers from the simulator's state."""
