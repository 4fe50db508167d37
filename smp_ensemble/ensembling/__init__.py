"""From snapshots to one model: members, combiners, selection."""
