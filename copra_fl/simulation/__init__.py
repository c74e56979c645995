"""Run the Flower app on this machine: recipes, checks, a private SuperLink, Ray, progress."""
