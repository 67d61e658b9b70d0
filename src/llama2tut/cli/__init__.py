"""argv -> request -> printed result and exit code."""
