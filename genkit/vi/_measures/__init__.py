"""Measures made of measures."""
