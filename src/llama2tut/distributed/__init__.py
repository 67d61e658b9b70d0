"""Several processes of one run, a GPU each: who they are, how they start and end, and weights in parts."""
