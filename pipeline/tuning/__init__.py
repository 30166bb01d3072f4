"""The tuning study: its trials, its storage, and the processes that train."""
