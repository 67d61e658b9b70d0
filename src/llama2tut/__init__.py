"""The Llama 2 fine-tuning tutorial as one command-line tool around llama-recipes."""

__version__ = "0.1.0"
