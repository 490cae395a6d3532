"""Objectives that train denoisers and scores."""
