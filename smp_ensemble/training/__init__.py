"""From data to snapshots: schedules, trainers, the Lightning module and the snapshot callback."""
