"""What several test modules share: federations in one process, hand-made rounds, run folders, a browser."""
