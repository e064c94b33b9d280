"""The routing report: what a mixture does with its experts, and whether routing is worth it."""
