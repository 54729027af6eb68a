"""What lies on disk: sources, folders, shards, adapters, manifests."""
