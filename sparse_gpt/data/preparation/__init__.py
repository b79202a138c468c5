"""Documents become shards: units of work, shared by processes and machines, resumable."""
