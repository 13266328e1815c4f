"""Buckets of an object store, gs:// and s3://: how they are reached, and how a run in one is held here."""
