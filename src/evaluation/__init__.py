"""Sets of clips, measured and compared: what `src.evaluate` does once everything is built."""
