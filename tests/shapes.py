"""Shapes of models that the tests reckon with, and never load."""

from llama2tut.models.base_models import BaseModel

LLAMA_2_7B = BaseModel("7b", "7b", {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32_000, "tie_word_embeddings": False})
QV = {"lora_targets": ("q_proj", "v_proj"), "lora_r": 8}
