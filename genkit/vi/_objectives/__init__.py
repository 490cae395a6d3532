"""Objectives on measures."""
