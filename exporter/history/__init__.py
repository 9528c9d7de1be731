"""What consecutive snapshots say: increases, changes, rates."""
