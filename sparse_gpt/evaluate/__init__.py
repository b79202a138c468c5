"""What is done with a trained model: found by its checkpoint's name, measured, made to write."""
