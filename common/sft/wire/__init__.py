"""What crosses: constants, cuts as messages, tensors and labels as bytes, and how many they were."""
