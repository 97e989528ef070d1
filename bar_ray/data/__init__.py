"""Data: row formats, chat rendering, packed token shards, mixtures, the stratified sample."""
