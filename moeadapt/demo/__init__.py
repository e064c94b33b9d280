"""The demo: four adapters trained alike on a real model, compared on held-out answers."""
