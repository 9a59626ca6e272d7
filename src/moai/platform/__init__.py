"""Floor 3: accelerators, flavors, the device pool, the platform's log. Knows nothing of graphs."""
