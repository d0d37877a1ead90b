"""Hand-written stand-ins, one per boundary of the server: engine, pool, scorer, coordinator."""
