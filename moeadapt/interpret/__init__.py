"""What experts contribute: the numbers behind a routing report."""
