"""Shared support of the tests: federations in one process, hand-made rounds, run folders, a browser."""
