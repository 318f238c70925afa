"""Fast evaluation of many cuts of one network: only what differs between candidates is computed again."""
