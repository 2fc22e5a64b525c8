"""Using a trained model: sampling text from it."""
