"""Scores of a generator: FID and its kin, path length, attribute linearity."""
