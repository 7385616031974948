"""Which chunks are on the device: requests, selection policies, the lookahead scheduler."""
