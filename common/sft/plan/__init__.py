"""What a run will take, by the paper's estimate: pure functions of measured times and sizes."""
