"""What can be asked for, and how a request and a run are stored."""
