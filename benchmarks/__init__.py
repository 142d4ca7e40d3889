"""Measurements against peers: each script prints a table and needs nothing but its command."""
