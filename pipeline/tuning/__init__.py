"""The tuning study: what it may try, what it has tried, and the processes that try it."""
