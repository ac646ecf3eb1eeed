"""Text: readers, filters, deduplication, decontamination, token shards, mixture, packing, evaluation sets."""
