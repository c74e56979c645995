"""Sources of models and examples: packaged assets, files, image folders, the Hugging Face hub."""
