"""Data files as tables, whatever program wrote them."""
