"""Mixtures as stock checkpoints: upcycling, export, merging, surgery."""
