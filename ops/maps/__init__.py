"""Neighbors inside feature maps and token rows: found, aggregated, attended to."""
