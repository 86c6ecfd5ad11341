"""Source rows → `Preference` → `EncodedPair` → `PairBatch`."""
