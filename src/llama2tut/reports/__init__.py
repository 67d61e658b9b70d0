"""What people read: tables, pages, cards and the plan of a run."""
