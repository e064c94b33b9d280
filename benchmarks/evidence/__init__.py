"""Whether routing helps: worlds with a known optimum, and a real model."""
