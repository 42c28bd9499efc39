"""Phantoms, and the stories that are told on them: never for clinical use."""
