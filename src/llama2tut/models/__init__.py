"""Base models, adapters and the device that they run on."""
