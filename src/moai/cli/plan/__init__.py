"""`moai plan`: which plan a training step would get, what it would take, and why. Needs no devices."""
