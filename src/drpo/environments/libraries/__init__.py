"""Environments of other libraries as tasks; each library is optional and imported where its task is made."""
