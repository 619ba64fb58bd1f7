"""Recipes shipped with hsrgan."""
