"""Measurements and the pictures made from them."""
