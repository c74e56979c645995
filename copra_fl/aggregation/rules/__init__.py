"""One aggregation rule per file, named as its paper names it."""
