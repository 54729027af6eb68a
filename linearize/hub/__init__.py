"""Publishing a folder on the Hugging Face Hub, with a model card."""
