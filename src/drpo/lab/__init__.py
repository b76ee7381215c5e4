"""The lab: problems small enough to be computed exactly, and recorded batches asked what other objectives would do."""
