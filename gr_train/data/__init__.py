"""Data: samples from Parquet or made up, collated into jagged batches, read by many processes."""
