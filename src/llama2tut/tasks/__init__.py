"""Rows, prompts, token ids and scores."""
