"""How learning proceeds: one loop for every stage, which it knows only by protocol."""
