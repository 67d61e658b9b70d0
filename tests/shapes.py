"""Shapes of models that the tests reckon with, and never load."""

from llama2tut.models.base_models import BaseModel

LLAMA_2_7B = BaseModel("7b", "7b", {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32_000, "tie_word_embeddings": False})
QV = {"lora_targets": ("q_proj", "v_proj"), "lora_r": 8}
SMOLLM2 = BaseModel("smollm2-135m", "smollm2-135m", {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True})
