"""Measurements side by side in one run: a split model against the whole. Ratios, not absolutes."""
