"""`sft-edge export`: a trained model as one that others can load."""
