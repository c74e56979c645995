"""Where models and examples come from: packaged assets, files, image folders, the Hugging Face hub."""
