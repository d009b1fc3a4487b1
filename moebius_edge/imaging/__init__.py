"""Pictures in and out: decoding, metadata, masks, and the windows that a hole is filled by."""
