"""Distances to the centers of growing networks, and the votes of those centers."""
