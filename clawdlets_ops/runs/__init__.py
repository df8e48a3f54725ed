"""Runs that were: their events read back, as a timeline, and as a page for people."""
