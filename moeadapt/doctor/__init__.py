"""What may be wrong with an adapter's folder or with the environment, and what to do about it.

`checks.CHECKS` is the registry; `examine.examine` runs it; the command line prints what it returns.
Nothing is changed and nothing that a file holds is run.
"""
