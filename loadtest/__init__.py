"""Load tests: what a user of the HTTP API sees. Only `rig` looks into the journal as well."""
