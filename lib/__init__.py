"""Helpers that two or more notebooks share. The notebooks hold the story and the training loop."""
