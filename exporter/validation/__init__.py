"""A candidate beside a reference: what is driven through both, how far apart they are, and how far they may be."""
