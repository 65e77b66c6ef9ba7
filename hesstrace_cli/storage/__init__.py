"""What stands on a disk: checkpoints, run folders, their records, locks, safe writing."""
