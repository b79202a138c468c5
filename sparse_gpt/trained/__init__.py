"""What is done with a trained model: a checkpoint is found by its name, and measured."""
