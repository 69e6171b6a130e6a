"""From shards to crops."""
