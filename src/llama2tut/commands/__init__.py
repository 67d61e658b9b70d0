"""One module a command: `run(request)` does the work and returns a frozen result; nothing here prints."""
