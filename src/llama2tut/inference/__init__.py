"""Prompts -> answers of the base model and its adapters."""
