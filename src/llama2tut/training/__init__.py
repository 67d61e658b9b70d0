"""One call of llama_recipes.finetuning.main: its arguments, its mends, and the run inside it."""
