"""Held-out evaluation of adapters: domains, arms, forgetting."""
