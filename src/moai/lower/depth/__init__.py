"""Deep models: what repeats layer by layer is lowered for a few layers, and written out for all of them."""
